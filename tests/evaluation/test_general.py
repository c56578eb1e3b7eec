"""Perplexity drift against a direct computation, and lm-eval through a stub of its interface."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pharmacist.cli.main import main
from pharmacist.evaluation.general import drift
from pharmacist.evaluation.statistics import wilson
from tests.support.tiny import save_tiny_model, tiny_llama, tiny_tokenizer


ROWS = [
    ("how do you brew bread", "warm water then flour"),
    ("tell me about seeds", "plant them in spring please"),
    ("good day", "yes"),
    ("what", "bake bread in an oven then stir and water them this day"),
]


def write(path: Path) -> str:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in ROWS))
    return str(path)


def command(folder: Path, *more: str) -> list[str]:
    words = ["evaluate", "--model", str(save_tiny_model(folder / "m", seed=1, initializer_range=0.3))]
    return [*words, "--device", "cpu", "--quiet", "--output-dir", str(folder / "o"), *more]


def test_drift_is_the_ratio_of_perplexities(tmp_path: Path) -> None:
    file, base = write(tmp_path / "p.jsonl"), str(save_tiny_model(tmp_path / "b", seed=0, initializer_range=0.3))
    assert main(command(tmp_path, "--perplexity", file, "--base", base)) == 0
    found = json.loads((tmp_path / "o/metrics.json").read_text())["perplexity_drift"]
    tokenizer, totals, tokens = tiny_tokenizer(), [], 0
    for seed in (1, 0):
        model, total, tokens = tiny_llama(tokenizer, seed, initializer_range=0.3), 0.0, 0
        for prompt, completion in ROWS:
            ids = tokenizer(f"<s> {prompt} <ans> {completion} </s>", add_special_tokens=False)["input_ids"]
            start = ids.index(tokenizer.convert_tokens_to_ids("<ans>")) + 1
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total -= sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))
            tokens += len(ids) - start
        totals.append(total)
    assert found["tokens"] == tokens and found["n"] == 4
    assert found["perplexity"] == pytest.approx(math.exp(totals[0] / tokens), rel=1e-5)
    assert found["base_perplexity"] == pytest.approx(math.exp(totals[1] / tokens), rel=1e-5)
    assert found["value"] == pytest.approx(100 * (math.exp((totals[0] - totals[1]) / tokens) - 1), rel=1e-4, abs=1e-3)
    assert found["ci95"][0] <= found["value"] <= found["ci95"][1]


def test_a_model_has_not_drifted_from_itself(tmp_path: Path) -> None:
    words = command(tmp_path, "--perplexity", write(tmp_path / "p.jsonl"), "--base", str(tmp_path / "m"))
    assert main(words) == 0
    found = json.loads((tmp_path / "o/metrics.json").read_text())["perplexity_drift"]
    assert (found["value"], found["ci95"]) == (0.0, None) and "the same" in found["no_ci95"]


def test_drifts_interval_covers_the_truth() -> None:
    rng, hits = np.random.default_rng(7), 0
    for _ in range(200):
        tokens = rng.integers(5, 60, 80).astype(float)
        difference = tokens * rng.normal(0.1, 0.3, 80)  # the ratio of the expectations is exp(0.1)
        rise = drift(difference, tokens)
        hits += rise.low <= 100 * math.expm1(0.1) <= rise.high
    assert 0.9 <= hits / 200 <= 0.985


def test_bad_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "p.jsonl")
    cases = {
        ("--perplexity", file): "--perplexity and --base, the model to compare with, need each other",
        ("--lm-eval", "arc_easy,"): "names with commas",
        ("--perplexity", file, "--base", "x", "--engine", "openai", "--engine.base_url", "http://x"): "the weights",
    }
    for more, message in cases.items():
        words = command(tmp_path, *more)
        capsys.readouterr()
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_lm_eval_is_the_harnesss_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(tmp_path, "--lm-eval", "arc_easy,gsm8k", "--seed", "-3")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(words) == 2
    assert "pip install 'pharmacist[lm-eval]'" in capsys.readouterr().err
    seen: dict[str, Any] = {}

    class HFLM:
        def __init__(self, **options: Any) -> None:
            seen["model"] = options

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        seen["call"] = options
        return {
            "results": {
                "arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.05, "acc_norm,none": 0.4},
                "hard": {"acc,none": 0.0, "acc_stderr,none": 0.0},
                "lambada": {"acc,none": 0.0, "acc_stderr,none": 0.0, "perplexity,none": math.nan},
                "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A"},
                "ifeval": {"alias": "ifeval", "prompt_level_strict_acc,none": 0.75, "inst_level_strict_acc,none": 0.8},
                "wikitext": {"word_perplexity,none": 20.0},
                "group": {" ,none": " ", "alias": "group"},
            },
            "n-samples": {"arc_easy": {"original": 200, "effective": 100}, "hard": {"effective": 50}},
        }

    harness, models = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    harness.simple_evaluate, harness.__version__ = simple_evaluate, "0.4.9"  # type: ignore[attr-defined]
    models.HFLM = HFLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setitem(sys.modules, "lm_eval.models", ModuleType("lm_eval.models"))
    known = SimpleNamespace(match_tasks=lambda names: [name for name in names if name in ("arc_easy", "gsm8k")])
    tasks: Any = ModuleType("lm_eval.tasks")
    tasks.TaskManager = lambda: known
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", models)
    assert main([word.replace("arc_easy", "arc_esy") for word in words]) == 2
    assert "--lm-eval arc_esy: lm-eval has no task of this name" in capsys.readouterr().err and not seen
    assert main([word for word in words if word != "--quiet"]) == 0
    told = "warning: --lm-eval wikitext: reports no accuracy but word_perplexity, which is in metrics.json only"
    assert told in capsys.readouterr().err
    assert seen["call"]["tasks"] == ["arc_easy", "gsm8k"] and seen["call"]["numpy_random_seed"] == 2**32 - 3
    found = json.loads((tmp_path / "o/metrics.json").read_text())
    easy = found["lm_eval_arc_easy"]
    assert (easy["value"], easy["n"], easy["judge"]) == (50.0, 100, "lm-eval@0.4.9")
    assert easy["ci95"] == pytest.approx(list(wilson(50, 100)))  # 0.5 * 0.5 / 0.05**2 = 100 rows
    strict = found["lm_eval_ifeval"]
    assert (strict["value"], strict["measure"]) == (75.0, "prompt_level_strict_acc,none")
    wikitext = found["lm_eval_wikitext"]
    assert (wikitext["value"], wikitext["ci95"], wikitext["all"]) == (None, None, {"word_perplexity,none": 20.0})
    assert "lm_eval_group" not in found
    assert found["lm_eval_lambada"]["all"] == {"acc,none": 0.0, "acc_stderr,none": 0.0}
    gsm = found["lm_eval_gsm8k"]
    assert (gsm["value"], gsm["ci95"], gsm["no_ci95"]) == (25.0, None, "the harness reports no error")
    # Nothing right, so that the harness's error is 0: an interval nevertheless, and none below 0.
    assert (found["lm_eval_hard"]["value"], found["lm_eval_hard"]["ci95"]) == (0.0, list(wilson(0, 50)))


def test_prompts_without_room_for_an_answer_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "how " * 3000, "completion": "yes"}) + "\n")
    assert main(command(tmp_path, "--perplexity", str(tmp_path / "p.jsonl"), "--base", str(tmp_path / "m"))) == 2
    assert "error: --perplexity: no row is left to work on" in capsys.readouterr().err


# --- margin ---------------------------------------------------------------------------------------------------------


def test_the_margin_is_the_difference_of_losses_per_token(tmp_path: Path) -> None:
    pairs = [("how do you brew bread", "yes", "warm water then flour"), ("what", "stir and water them", "good day")]
    rows = [{"prompt": p, "chosen": refusal, "rejected": harmful} for p, refusal, harmful in pairs]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(command(tmp_path, "--margin", str(tmp_path / "m.jsonl"))) == 0
    found = json.loads((tmp_path / "o/metrics.json").read_text())["loss_margin"]
    assert found["interval"] == "Student's t over prompts" and "judge" not in found
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer, 1, initializer_range=0.3)

    def loss(prompt: str, completion: str) -> float:
        ids = tokenizer(f"<s> {prompt} <ans> {completion} </s>", add_special_tokens=False)["input_ids"]
        start = ids.index(tokenizer.convert_tokens_to_ids("<ans>")) + 1
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return -sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids))) / (len(ids) - start)

    expected = [loss(prompt, harmful) - loss(prompt, refusal) for prompt, refusal, harmful in pairs]
    assert found["values"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert found["value"] == pytest.approx(sum(expected) / 2, rel=1e-4, abs=1e-5)
    assert found["n"] == 2 and found["ci95"][0] < found["value"] < found["ci95"][1]


def test_the_margin_needs_both_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--margin", write(tmp_path / "p.jsonl"))) == 2
    assert "needs preference rows" in capsys.readouterr().err
