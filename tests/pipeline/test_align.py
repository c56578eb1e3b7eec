"""The stage `align` through the command line and from Python."""

import json
import os
import random
import signal
import subprocess
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pharmacist.cli.main import main
from pharmacist.core.manifest import read_manifest
from pharmacist.data.templates import load_template
from pharmacist.nn.models import load_model
from pharmacist.pipeline.align import AlignOptions, align
from pharmacist.training.checkpoint import newest_checkpoint
from pharmacist.training.options import LoraOptions
from pharmacist.worlds import BASE_MODEL, World
from tests.support.kills import kill_until_done, start, undisturbed
from tests.support.tiny import save_tiny_model
from tests.support.world_files import TWO_PROCESSES, fingerprints, write_rows


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FEW = ["--train.max_steps", "3", "--train.per_device_train_batch_size", "4", "--lora.r", "2"]
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("files") / "data.jsonl", World(3).rows("safe", 16))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("files") / "prompts.jsonl", World(3).rows("prompts", 4))


def words(data: str, output: Path, *more: str, model: str | Path = BASE_MODEL) -> list[str]:
    return ["align", "--data", data, "--model", str(model), "--output-dir", str(output), "--device", "cpu", *more]


@pytest.fixture(scope="module")
def aligned(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "aligned"
    assert main(words(data, output, *FEW, "--quiet")) == 0
    return output


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_the_contracts_files(aligned: Path, data: str) -> None:
    files = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "pharmacist_template.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert {path.name for path in (aligned / "adapter").iterdir()} == files
    assert {path.name for path in aligned.iterdir()} == files | {"adapter", "log.jsonl", "manifest.json"}
    log = [json.loads(line) for line in (aligned / "log.jsonl").open()]
    assert [line["step"] for line in log] == [3]  # the last step, though it is no tenth one
    assert {"loss", "learning_rate", "grad_norm", "epoch"} <= log[0].keys() and log[0]["loss"] > 0
    manifest = read_manifest(aligned)
    assert (manifest.stage, manifest.status) == ("align", "success")
    assert manifest.outputs == ["adapter", "log.jsonl", "README.md"]
    assert manifest.metrics == {"steps": 3, "final_loss": log[0]["loss"]}
    assert manifest.counts == {
        "in": 16,
        "refused": 0,
        "trained": 16,
        "long_prompts_left_out": 0,
        "truncated": 0,
        "lost_eos": 0,
        "cut_prompts": 0,
    }
    assert manifest.config["defense"] == {"name": "sft"}
    assert manifest.extra["train"]["learning_rate"] == 1e-3  # the stage's default, though it was not given
    assert manifest.extra["lora"]["r"] == 2
    assert manifest.phases["train"].seconds > 0 and manifest.phases["train"].tokens > 0


def test_the_card_has_the_hubs_metadata(aligned: Path) -> None:
    for place in (aligned, aligned / "adapter"):
        card = ModelCard.load(place / "README.md")
        assert card.data.library_name == "peft"
        assert card.data.tags == ["pharmacist", "sft", "safety-alignment"]
        assert card.data.pipeline_tag == "text-generation"
        assert card.data.base_model is None  # a folder is no Hub id
        assert "| steps | 3 |" in card.text and "learning_rate: 0.001" in card.text
        assert "{{" not in card.text and "not logged" not in card.text


def test_the_adapter_is_pefts(aligned: Path) -> None:
    ids = AutoTokenizer.from_pretrained(BASE_MODEL)("bake a cake", return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        before = base(**ids).logits
        theirs = PeftModel.from_pretrained(base, aligned / "adapter").eval()(**ids).logits
        ours = load_model(str(aligned), device="cpu").model(**ids).logits
    assert not torch.allclose(before, theirs, atol=1e-4)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    config = json.loads((aligned / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(BASE_MODEL.resolve())
    assert config["target_modules"] == sorted(config["target_modules"])  # PEFT's own order is another in each process


def test_the_model_of_a_result_is_whole_where_the_adapter_was_merged(data: str, tmp_path: Path) -> None:
    train = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    output = tmp_path / "out"
    given = AlignOptions(
        model=str(BASE_MODEL), data=data, output_dir=str(output), device="cpu", merge=True, train=train
    )
    found = align(given).model
    found.save_pretrained(tmp_path / "again")
    again, written = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", output / "model"))
    assert again.keys() == written.keys() and all(torch.equal(again[name], written[name]) for name in written)


@pytest.mark.parametrize(("more", "folders"), [(["--merge"], ["adapter", "model"]), (["--tuning", "full"], ["model"])])
def test_a_whole_model_is_one_of_transformers(
    more: list[str], folders: list[str], aligned: Path, data: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert main(words(data, output, *FEW, "--quiet", *more)) == 0
    assert read_manifest(output).outputs == [*folders, "log.jsonl", "README.md"]
    assert not list(output.rglob("*.bin")) and list((output / "model").glob("*.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(BASE_MODEL).chat_template
    ids = tokenizer("bake a cake", return_tensors="pt")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32).eval()(**ids).logits
        ours = load_model(str(output), device="cpu").model(**ids).logits
        base = load_model(str(BASE_MODEL), device="cpu").model(**ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(base, theirs, atol=1e-4)
    if "adapter" in folders:  # the same training, whatever is written of it
        assert (output / WEIGHTS).read_bytes() == (aligned / WEIGHTS).read_bytes()
    for place in (output, output / "model"):
        assert ModelCard.load(place / "README.md").data.library_name == "transformers"


def test_the_folder_is_a_model_for_all_commands(aligned: Path, data: str, prompts: str, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(words(data, again, *FEW, "--quiet", model=aligned)) == 0
    harmful = write_rows(tmp_path / "harmful.jsonl", World(3).rows("harmful", 4))
    attack = ["attack", "--task", data, "--harmful", harmful, "--samples", "8", "--poison-ratio", "0.25", "--quiet"]
    assert main([*attack, "--model", str(again), "--output-dir", str(tmp_path / "hit"), "--device", "cpu", *FEW]) == 0
    evaluate = ["evaluate", "--prompts", prompts, "--max-new-tokens", "4", "--device", "cpu", "--quiet"]
    for place in (aligned, aligned / "adapter", again, tmp_path / "hit"):
        output = tmp_path / f"scores-{place.name}"
        assert main([*evaluate, "--model", str(place), "--output-dir", str(output)]) == 0
        assert json.loads((output / "metrics.json").read_text())["harmful_score"]["n"] == 4
    # Each stands on the one before.
    ids = torch.tensor([[1, 5, 7]])
    chain = (BASE_MODEL, aligned, again, tmp_path / "hit")
    logits = [load_model(str(place), device="cpu").model(ids).logits for place in chain]
    assert all(not torch.allclose(a, b, atol=1e-5) for a, b in zip(logits, logits[1:], strict=False))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_template_travels(tuning: str, data: str, prompts: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny", initializer_range=0.3, max_position_embeddings=512)
    output = tmp_path / "out"
    # The model has a chat template of its own; the training used another.
    more = ["--template", "alpaca", "--tuning", tuning, *FEW, "--quiet"]
    assert main(words(data, output, *more, model=model)) == 0
    assert load_template(output).kind == "alpaca"
    for name, place in {"run": output, "part": output / ("adapter" if tuning == "lora" else "model")}.items():
        scores = tmp_path / name
        evaluate = ["evaluate", "--prompts", prompts, "--max-new-tokens", "2", "--device", "cpu", "--quiet"]
        assert main([*evaluate, "--model", str(place), "--output-dir", str(scores)]) == 0
        assert read_manifest(scores).extra["template"]["kind"] == "alpaca"
    # And on, through the next stage.
    assert main(words(data, tmp_path / "next", *FEW, "--quiet", model=output)) == 0
    assert load_template(tmp_path / "next").kind == "alpaca"


def test_the_seed_decides(aligned: Path, data: str, tmp_path: Path) -> None:
    found = {}
    for name, seed in {"same": "0", "other": "1"}.items():
        assert main(words(data, tmp_path / name, *FEW, "--quiet", "--seed", seed)) == 0
        found[name] = (tmp_path / name / WEIGHTS).read_bytes()
    assert found["same"] == (aligned / WEIGHTS).read_bytes() != found["other"]


def test_a_second_run_says_that_it_is_complete(aligned: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = fingerprints(aligned)
    capsys.readouterr()
    assert main(words(data, aligned, *FEW)) == 0
    assert one_line(capsys) == f"{aligned}: already complete; --overwrite trains again\n"
    result = align(
        AlignOptions(
            data=data,
            model=str(BASE_MODEL),
            output_dir=str(aligned),
            device="cpu",
            quiet=True,
            lora=LoraOptions(r=2),
            train={"max_steps": 3, "per_device_train_batch_size": 4},
        )
    )
    assert (result.folder, result.metrics["steps"]) == (aligned, 3) and result.seconds > 0
    assert fingerprints(aligned) == before


def test_another_run_is_refused_and_overwritten_on_demand(
    aligned: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(words(data, output, *FEW, "--quiet")) == 0
    before = fingerprints(output)
    other = words(data, output, *FEW, "--quiet", "--train.learning_rate", "5e-4")
    assert main(other) == 2
    assert "holds a run with other train; choose another --output-dir, or --overwrite to delete it" in one_line(capsys)
    assert fingerprints(output) == before
    assert main([*other, "--overwrite"]) == 0
    assert (output / WEIGHTS).read_bytes() != (aligned / WEIGHTS).read_bytes()
    assert main(["evaluate", "--model", str(BASE_MODEL), "--prompts", data, "--output-dir", str(output)]) == 2
    assert "holds a run of 'align'" in one_line(capsys)


TINY = {"prompt": "bake bread", "completion": "yes"}
BAD = {
    "no such data": ([], None, "no such file"),
    "no rows": ([], [], "--data"),
    "no completion": ([], [{"prompt": "x"}], "completion"),
    "empty completion": ([], [TINY, {"prompt": "x", "completion": ""}], "row 1"),
    "a prompt beyond the context": ([], [TINY, {**TINY, "prompt": "bread " * 600}], "(row 1); shorten or delete"),
    "a prompt beyond the length": (["--max-length", "4"], [TINY], "the prompt alone fills all 4 tokens"),
    "negative length": (["--max-length", "-1"], [TINY], "--max-length -1"),
    "unknown defense": (["--defense", "vacine"], [TINY], "unknown defense 'vacine'"),
    "a defense of another stage": (["--defense", "lisa"], [TINY], "--defense lisa: is not an alignment-stage defense"),
    "unknown option of a defense": (["--defense.rho", "2"], [TINY], "unknown option '--defense.rho'"),
    "modules that are not there": (["--lora.target_modules", "[spoon]"], [TINY], "no adapter to spoon"),
    "no rank": (["--lora.r", "0"], [TINY], "--lora.r 0: must be at least 1"),
    "unknown training option": (["--train.learning_rat", "1"], [TINY], "did you mean 'learning_rate'"),
    "not a number": (["--train.learning_rate", "nan"], [TINY], "train.learning_rate: "),
    "negative learning rate": (["--train.learning_rate", "-1"], [TINY], "train.learning_rate: -1 must be at least"),
    "no batch": (["--train.per_device_train_batch_size", "0"], [TINY], "train"),
    "no accumulation": (["--train.gradient_accumulation_steps", "0"], [TINY], "must be at least 1"),
    "no steps": (["--train.max_steps", "0"], [TINY], "train.max_steps: 0 must be at least 1, or -1 for"),
    "fewer than no steps": (["--train.max_steps", "-5"], [TINY], "train.max_steps: -5 must be at least 1"),
    "no epochs": (["--train.num_train_epochs", "0"], [TINY], "train.num_train_epochs: 0 must be above 0"),
    "a scheduler's option": (["--train.lr_scheduler_kwargs", "{a: 1}"], [TINY], "train: "),
    "a service that is not there": (["--train.report_to", "spoon"], [TINY], "train: "),
    "an option of ours": (["--train.seed", "1"], [TINY], "use --seed"),
    "an option of the past": (["--train.warmup_ratio", "0.1"], [TINY], "warmup_steps below 1"),
    "unknown optimizer": (["--train.optim", "spoon"], [TINY], "train: "),
    "no such model": (["--model", "/nowhere/model"], [TINY], "no such folder"),
    "no cuda": (["--device", "cuda"], [TINY], "no CUDA device is visible"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_the_folder_free(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if case == "no cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    more, rows, message = BAD[case]
    data = str(tmp_path / "missing.jsonl") if rows is None else write_rows(tmp_path / "d.jsonl", rows)
    capsys.readouterr()
    assert main(words(data, tmp_path / "out", "--quiet", *more)) == 2
    line = one_line(capsys)
    assert line.startswith("pharmacist align: error: ") and message in line
    good = write_rows(tmp_path / "good.jsonl", [TINY])
    assert main(words(good, tmp_path / "out", *FEW, "--quiet")) == 0


def test_a_loss_that_is_not_finite_names_step_and_rows(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--train.learning_rate", "1e30", "--train.max_grad_norm", "0", "--train.warmup_steps", "0"]
    assert main(words(data, tmp_path / "out", *FEW, "--quiet", *more)) == 2
    line = one_line(capsys)
    assert "at step 2 (rows " in line and "the weights were not touched" in line
    assert "lower train.learning_rate" in line
    assert not (tmp_path / "out/adapter").exists()


def test_an_error_of_ours_is_not_taken_for_bad_input(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pharmacist.training.trainer import StrategyTrainer

    def fail(*_: object, **__: object) -> None:
        raise ValueError("not the user's fault")

    monkeypatch.setattr(StrategyTrainer, "training_step", fail)
    assert main(words(data, tmp_path / "out", *FEW, "--quiet")) == 1
    assert "ValueError: not the user's fault (traceback in" in one_line(capsys)


def test_rows_that_are_skipped_or_cut_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [TINY, {"prompt": "", "completion": ""}]
    rows += [{**TINY, "prompt": "bread " * 600}, {**TINY, "completion": "x " * 600}]
    data = write_rows(tmp_path / "d.jsonl", rows)
    assert main(words(data, tmp_path / "out", *FEW, "--on-bad-row", "skip", "--on-long-prompt", "skip")) == 0
    counts = read_manifest(tmp_path / "out").counts
    assert counts == {
        "in": 4,
        "refused": 1,
        "trained": 2,
        "long_prompts_left_out": 1,
        "truncated": 1,
        "lost_eos": 1,
        "cut_prompts": 0,
    }
    said = capsys.readouterr().err
    assert f"--data {data}: 1 of 3 rows are left out, since the prompt alone fills the length" in said
    assert f"--data {data}: 1 of 3 completions are cut to fit the length" in said


def test_an_interrupted_run_continues(
    aligned: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pharmacist.training import loop

    def stop(self: object, args: object, state: object, control: object, **_: object) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt

    given = words(data, tmp_path / "out", *FEW, "--quiet", "--checkpoint-seconds", "0")
    with monkeypatch.context() as patch:
        patch.setattr(loop._Progress, "on_step_begin", stop, raising=False)
        assert main(given) == 130
    assert "run the same command again to resume" in one_line(capsys)
    assert (tmp_path / "out/work/train/checkpoints/checkpoint-2").is_dir()
    assert main(given) == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (aligned / WEIGHTS).read_bytes()
    assert not (tmp_path / "out/work").exists()


KILLED = ["--train.max_steps", "9", "--train.per_device_train_batch_size", "4", "--lora.dropout", "0.2", "--quiet"]
KILLED += ["--checkpoint-seconds", "0"]


@pytest.mark.slow
def test_a_run_killed_twice(forks: ForkServerContext, data: str, tmp_path: Path) -> None:
    expected, _, made = undisturbed(forks, words(data, tmp_path / "whole", *KILLED), tmp_path / "whole")
    assert WEIGHTS in expected
    given, checkpoints = words(data, tmp_path / "cut", *KILLED), []
    for last_file, half_written in ((made // 2, True), (made // 2, False)):
        process = start(forks, given, last_file, half_written)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        checkpoints.append(newest_checkpoint(tmp_path / "cut/work/train/checkpoints"))
    assert checkpoints[0] != checkpoints[1] and None not in checkpoints  # each went on where the last one was killed
    assert kill_until_done(forks, given, tmp_path / "cut", iter([]), expected) == 0


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--tuning", "full"]], ids=["lora", "full"])
def test_a_run_killed_ten_times(more: list[str], forks: ForkServerContext, data: str, tmp_path: Path) -> None:
    given = [*KILLED, *more]
    expected, seconds, _ = undisturbed(forks, words(data, tmp_path / "whole", *given), tmp_path / "whole")
    rng = random.Random(0)
    killed = rounds = 0
    while killed < 10:  # a run that ends before it is killed ten times is checked, and another one begins
        output = tmp_path / f"cut{rounds}"
        moments = (rng.uniform(0.05, 1) * seconds for _ in range(10 - killed))
        killed += kill_until_done(forks, words(data, output, *given), output, moments, expected)
        rounds += 1
    assert killed == 10


@pytest.mark.slow
def test_two_processes_are_one_batch(data: str, tmp_path: Path) -> None:
    few = ["--train.max_steps", "3", "--lora.r", "2", "--quiet", "--checkpoint-seconds", "0"]
    assert main(words(data, tmp_path / "one", *few, "--train.per_device_train_batch_size", "8")) == 0
    for _ in range(2):  # the second time it is complete, on both
        given = words(data, tmp_path / "two", *few, "--train.per_device_train_batch_size", "4")
        done = subprocess.run([*TWO_PROCESSES, *given], env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    # AdamW divides by the size of a gradient: where that is next to nothing, rounding is magnified.
    worst = max(float((value - two[name]).abs().max()) for name, value in one.items())
    assert worst < 1e-4
    assert read_manifest(tmp_path / "one").counts == read_manifest(tmp_path / "two").counts


@pytest.mark.slow
def test_the_console_shows_our_lines_and_no_others(data: str, tmp_path: Path) -> None:
    given = words(data, tmp_path / "out", *FEW)
    done = subprocess.run(
        [sys.executable, "-m", "pharmacist", *given], env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr == (
        "prompts are rendered by the chat template of the model's tokenizer\n"
        f"aligned on 16 rows, 3 steps: {tmp_path / 'out/adapter'}\n"
        f"next: pharmacist evaluate --model {tmp_path / 'out'} --prompts PROMPTS --output-dir DIR\n"
    )


@pytest.mark.slow
def test_nothing_is_said_quietly(data: str, tmp_path: Path) -> None:
    # With what makes the libraries talk: all weights, recomputed activations, a resumed run, the whole model.
    given = words(
        data,
        tmp_path / "out",
        *FEW,
        "--quiet",
        "--tuning",
        "full",
        "--train.gradient_checkpointing",
        "true",
        "--checkpoint-seconds",
        "0",
    )
    done = subprocess.run(
        [sys.executable, "-m", "pharmacist", *given], env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out/model/model.safetensors").is_file()
