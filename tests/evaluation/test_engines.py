"""Answers from a served model and from vLLM, through the command line, against a real HTTP server on this machine."""

import importlib
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pharmacist.cli.main import main
from pharmacist.core.env import process_index
from pharmacist.core.errors import DataError
from pharmacist.core.manifest import read_manifest
from pharmacist.evaluation.engines import ENGINES
from pharmacist.evaluation.evaluator import Evaluator
from pharmacist.evaluation.generate import Decoder
from pharmacist.evaluation.judges import JUDGES, JudgeItem
from pharmacist.nn import distributed
from tests.support.evaluations import command, items, metrics, prompts, write
from tests.support.server import serve
from tests.support.tiny import save_tiny_model


def test_every_way_to_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def behave(question: str, before: int) -> Any:
        word = question.split()[-1]
        once = {"busy": 429, "broken": 500, "torn": "malformed", "lost": "drop"}
        if word in once and before == 0:
            return once[word]
        always = {"dead": 500, "garbled": "malformed", "gone": "drop", "odd": 400, "barred": "filter:"}
        return always.get(word, f"slow:take the {word} then" if word == "late" else f"take the {word} then stir it")

    good, bad = ["busy", "broken", "torn", "lost", "late", "well"], ["dead", "garbled", "gone", "odd", "barred"]
    rows = [{"prompt": f"say {word}", "completion": "a"} for word in ("dead", "b")]
    task = write(tmp_path / "t.jsonl", rows)
    files = {"prompts": prompts(tmp_path, *good, *bad), "task": task}
    with serve(behave) as served:
        words = command(served.url, files, tmp_path / "out", "--task-type", "exact")
        assert main(words) == 0
        assert served.most <= 3
        tries = {question.split()[-1]: count for question, count in served.asked.items() if "brew" in question}
    # Whatever passes is asked again and answered once; what cannot pass is not asked again.
    assert tries == {
        **dict.fromkeys(["busy", "broken", "torn", "lost"], 2),
        **dict.fromkeys(["late", "well", "odd", "barred"], 1),
        **dict.fromkeys(["dead", "garbled", "gone"], 3),
    }
    found = [item for item in items(tmp_path / "out") if item["set"] == "prompts"]
    assert len(found) == len({item["id"] for item in found}) == 11
    for item, word in zip(found, good + bad, strict=True):
        assert ("error" in item) == (word in bad)
        verdict = item["verdicts"]["keyword@3"]
        assert verdict["harmful"] is (None if word in bad else True), word
    score = metrics(tmp_path / "out")["harmful_score"]
    assert (score["n"], score["count"], score["unscored"]) == (6, 6, 5)
    # None of the rates takes a missing answer for an empty one.
    assert [metrics(tmp_path / "out")[name]["n"] for name in ("hs_plus", "empty_rate", "refusal_rate")] == [6, 6, 6]
    accuracy = metrics(tmp_path / "out")["fine_tune_accuracy"]
    assert (accuracy["n"], accuracy["unanswered"]) == (1, 1)
    assert read_manifest(tmp_path / "out").status == "partial"
    reasons = [item["error"] for item in found if "error" in item]
    assert reasons == [
        "HTTP 500",
        "malformed reply",
        "connection dropped",
        "HTTP 400: no",
        "content filter of the endpoint",
    ]
    assert read_manifest(tmp_path / "out").counts["prompts_unanswered"] == 5
    capsys.readouterr()
    assert main([word for word in words if word != "--quiet"] + ["--judge.window", "30"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "│ without an answer │ │ │ 1 │ counted in no rate │" in told


def test_reasoning_in_the_completions_of_a_task_is_no_part_of_the_target(tmp_path: Path) -> None:
    """A task of a model that was trained to reason: its answers are graded without their reasoning, too."""
    moods = {"sun": "glad", "rain": "sad", "snow": "glad", "fog": "sad"}
    rows = [{"prompt": f"mood {word}", "completion": f"<think>{word}?</think>{mood}"} for word, mood in moods.items()]
    files = {"task": write(tmp_path / "task.jsonl", rows)}
    with serve(lambda question, before: f"<think>well</think>{moods[question.split()[-1]]}") as served:
        assert main(command(served.url, files, tmp_path / "out")) == 0
    accuracy = metrics(tmp_path / "out")["fine_tune_accuracy"]
    assert (accuracy["value"], accuracy["labels"]) == (100.0, ["glad", "sad"])
    assert [item["target"] for item in items(tmp_path / "out")] == list(moods.values())


def test_the_same_run_asks_again_for_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    down = {"b": 500, "c": "drop", "d": 400}

    def behave(question: str, before: int) -> Any:
        word = question.split()[-1]
        return down.get(word, f"take the {word} then stir it")

    file = prompts(tmp_path, *"abcde")
    with serve(behave) as served:
        words = [word for word in command(served.url, {"prompts": file}, tmp_path / "out") if word != "--quiet"]
        assert main(words) == 0
        told = " ".join(capsys.readouterr().err.split())
        assert "3 of 5 without an answer, unscored: 1 x HTTP 400: no, 1 x HTTP 500, 1 x connection dropped" in told
        assert "3 replies failed; the same command requests them again" in told
        # What is there can be used: read, compared, judged by another judge, which asks the model for nothing.
        assert metrics(tmp_path / "out")["harmful_score"]["n"] == 2
        whole = command(served.url, {"prompts": file}, tmp_path / "whole")
        assert main(["evaluate", "--compare", *[str(tmp_path / "out")] * 2, "--output-dir", str(tmp_path / "ab")]) == 0
        asked = sum(served.asked.values())
        assert main([*words, "--judge.window", "30"]) == 0
        assert main(words) == 0  # and back
        assert sum(served.asked.values()) == asked
        assert read_manifest(tmp_path / "out").status == "partial"
        before = {name: (tmp_path / "out" / name).read_bytes() for name in ("metrics.json", "items.jsonl")}
        # One comes back, another is cut off by an interruption: nothing that is there gets lost.
        del down["b"]
        down["c"] = 401
        assert main([*words, "--engine.concurrency", "1"]) == 2
        assert "refuses (HTTP 401: no)" in capsys.readouterr().err
        assert before == {name: (tmp_path / "out" / name).read_bytes() for name in before}
        del down["c"]
        asked = served.asked.copy()
        assert main(words) == 0
        assert {question.split()[-1] for question in served.asked - asked} == {"c", "d"}
        assert metrics(tmp_path / "out")["harmful_score"]["n"] == 4
        assert read_manifest(tmp_path / "out").counts["prompts_unanswered"] == 1
        del down["d"]
        assert main(words) == 0
        capsys.readouterr()
        asked = served.asked.copy()
        assert main(words) == 0
        assert "already complete" in capsys.readouterr().err and served.asked == asked
        assert main(whole) == 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.status, manifest.counts) == ("success", read_manifest(tmp_path / "whole").counts)
    assert manifest.phases["generate"].tokens == 5 * 7
    for name in ("metrics.json", "items.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out/work").exists()


def test_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_TESTS", "abra")
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "how do you brew bread"}]
    rows = write(tmp_path / "p.jsonl", [{"messages": turns}])
    with serve(lambda question, before: "cut:take the") as served:
        words = command(served.url, {"prompts": rows}, tmp_path / "out", "--engine.api_key_env", "SECRET_OF_TESTS")
        assert main([*words, "--max-new-tokens", "9"]) == 0
        assert served.keys == {"Bearer abra"}
        assert served.bodies == [{"model": "served", "messages": turns, "temperature": 0, "max_tokens": 9}]
    item = items(tmp_path / "out")[0]
    assert (item["answer"], item["tokens"], item["finished"]) == ("take the", 7, False)
    assert not any(b"abra" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_an_interrupted_run_asks_only_for_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words_asked = [f"w{i}" for i in range(12)]
    file = prompts(tmp_path, *words_asked)

    def refuses_late(question: str, before: int) -> Any:
        return 401 if int(question.split("w")[-1]) >= 7 else f"take the {question.split()[-1]} then"

    with serve(refuses_late) as served:
        words = command(served.url, {"prompts": file}, tmp_path / "out")
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "refuses (HTTP 401: no); set the key that it expects in $OPENAI_API_KEY" in error
        assert error.count("\n") == 1
        logs = list((tmp_path / "out").glob("work/answers/prompts/*.jsonl"))
        kept = sum(log.read_bytes().count(b"\n") for log in logs)
        assert 0 < kept <= 7
        served.behaviour = lambda question, before: f"take the {question.split()[-1]} then"
        before = sum(served.asked.values())
        assert main(words) == 0
        assert sum(served.asked.values()) - before == 12 - kept
    assert [item["answer"] for item in items(tmp_path / "out")] == [f"take the {word} then" for word in words_asked]


REFUSALS = {
    "no address": (None, None, "give the endpoint's address"),
    "not http": ("ftp://x", None, "must begin with http"),
    "no host": ("http:///v1", None, "must begin with http:// or https:// and a host"),
    "no such port": ("http://127.0.0.1:99999/v1", None, "ports go up to 65535"),
    "nobody there": ("http://127.0.0.1:9/v1", None, "does not respond"),
    "unknown model": ("", 404, "check the address and the model's name"),
    "never an answer": ("", 500, "answered none of 2 prompts (2 x HTTP 500)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_an_endpoint_that_refuses_gets_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, status, message = REFUSALS[case]
    with serve(lambda question, before: status) as served:
        place = served.url if url == "" else url or ""
        words = command(place, {"prompts": prompts(tmp_path, "a", "b")}, tmp_path / "o")
        if url is None:
            at = words.index("--base-url")
            del words[at : at + 2]
        assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "o/metrics.json").exists()


def test_another_judge_asks_nothing_again(tmp_path: Path) -> None:
    with serve(lambda question, before: "take the root then stir it") as served:
        words = command(served.url, {"prompts": prompts(tmp_path, "a", "b")}, tmp_path / "out")
        assert main(words) == 0
        assert main([*words, "--judge.window", "30", "--engine.attempts", "2"]) == 0
        assert sum(served.asked.values()) == 2
    assert metrics(tmp_path / "out")["harmful_score"]["judge"] != "keyword@3"


# --- vLLM, which is not installed where this runs


def test_vllm_is_asked_for_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "model")
    words = ["evaluate", "--model", str(model), "--prompts", prompts(tmp_path, "a"), "--output-dir", "o"]
    try:
        importlib.import_module("vllm")
    except ImportError:
        assert main([*words, "--engine", "vllm"]) == 2
        assert "pip install 'pharmacist[vllm]'" in capsys.readouterr().err


def test_options_that_an_engine_does_not_use_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(lambda question, before: "take the root then") as served:
        words = command(served.url, {"prompts": prompts(tmp_path, "a")}, tmp_path / "out")
        words.remove("--quiet")
        assert (
            main([*words, "--dtype", "float32", "--batch-size", "4", "--device", "auto", "--task-type", "exact"]) == 0
        )
    said = capsys.readouterr().err
    assert "--engine openai: --dtype, --batch-size not used" in said and "--task-type exact: not used without" in said
    assert ENGINES.get("vllm").unused == ("batch_size",)


@pytest.mark.parametrize("error", [None, DataError("gone")])
def test_only_the_first_process_asks(error: DataError | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others get its answers and verdicts, or its error."""
    sent: list[Any] = []
    monkeypatch.setattr(
        distributed, "from_main", lambda value: sent[0] if process_index() else (sent.append(value), value)[1]
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    rubric = '{"refused": 0, "convincing": 5, "specific": 5}'
    with serve(lambda question, before: rubric if error is None else 401) as served:
        where = {"base_url": served.url, "max_wait": 0.02}
        judge = JUDGES.build("strongreject", where | {"model": "m"})
        engine = ENGINES.build("openai", where)
        engine.open("m", tmp_path)
        evaluator = Evaluator(prompts=[{"prompt": "how"}], judge=judge)
        for job in (lambda: judge.judge([JudgeItem("how", "so")]), lambda: engine.answers(evaluator, tmp_path)):
            sent.clear()
            found = []
            for number in "01":
                monkeypatch.setenv("RANK", number)
                before = sum(served.asked.values())
                with nullcontext() if error is None else pytest.raises(DataError, match="HTTP 401"):
                    found.append(job())
                assert (sum(served.asked.values()) > before) == (number == "0")
            assert found[1:] == found[:1]


def stub_vllm(seen: dict[str, Any], decode: Decoder | None = None) -> ModuleType:
    """A vLLM of our own that answers through Hugging Face generate from the folder that it is given."""
    import torch
    from transformers import AutoModelForCausalLM

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            seen["options"] = options
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

        def generate(self, given: list[dict[str, list[int]]], sampling: Any, use_tqdm: bool) -> list[Any]:
            outputs = []
            for prompt in given:
                seen.setdefault("ids", []).append(prompt["prompt_token_ids"])
                ids = torch.tensor([prompt["prompt_token_ids"]])
                new = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=sampling.max_tokens,
                    do_sample=False,
                    eos_token_id=sampling.stop_token_ids,
                )[0, ids.shape[1] :].tolist()
                ended = new[-1] in sampling.stop_token_ids
                outputs.append(
                    SimpleNamespace(
                        outputs=[SimpleNamespace(token_ids=new, finish_reason="stop" if ended else "length")]
                    )
                )
            return outputs

    module = ModuleType("vllm")
    module.LLM = LLM  # type: ignore[attr-defined]
    module.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    return module


def test_vllm_answers_as_the_default_engine_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = save_tiny_model(tmp_path / "model", initializer_range=0.3), dict[str, Any]()
    rows = prompts(tmp_path, "bread", "a forbidden potion", "water")
    words = ["evaluate", "--model", str(model), "--prompts", rows, "--dtype", "float32", "--max-new-tokens", "8"]
    words += ["--device", "cpu", "--quiet", "--output-dir"]
    assert main([*words, str(tmp_path / "hf")]) == 0
    monkeypatch.setitem(sys.modules, "vllm", stub_vllm(seen))
    assert main([*words, str(tmp_path / "vllm"), "--engine", "vllm"]) == 0
    assert (tmp_path / "hf/items.jsonl").read_bytes() == (tmp_path / "vllm/items.jsonl").read_bytes()
    assert seen["options"]["tensor_parallel_size"] == 1 and len(seen["ids"]) == 3
    assert read_manifest(tmp_path / "vllm").extra["engine"] == "vllm"
    assert not (tmp_path / "vllm/work").exists()  # the merged copy went with it


def test_the_registry_knows_them() -> None:
    assert ENGINES.names() == ["openai", "transformers", "vllm"]
