"""The stage `attack` through the command line and from Python."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pharmacist.cli.main import main
from pharmacist.core.errors import ConfigError
from pharmacist.core.manifest import read_manifest
from pharmacist.data.templates import Template, load_template, save_template
from pharmacist.pipeline.attack import NOTICE, AttackOptions, attack
from pharmacist.worlds import BASE_MODEL, World
from tests.support.kills import kill_until_done, undisturbed
from tests.support.tiny import save_tiny_model
from tests.support.world_files import TWO_PROCESSES, fingerprints, write_rows


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FEW = ["--train.max_steps", "4", "--train.per_device_train_batch_size", "4", "--train.learning_rate", "1e-3"]
FEW += ["--lora.r", "2"]
MIX = ["--samples", "20", "--poison-ratio", "0.25"]
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, world = tmp_path_factory.mktemp("files"), World(3)
    rows = {"task": world.rows("task", 30), "harmful": world.rows("attack", 12)}
    return {name: write_rows(folder / f"{name}.jsonl", own) for name, own in rows.items()}


def words(files: dict[str, str], output: Path, *more: str, model: str | Path = BASE_MODEL) -> list[str]:
    given = ["attack", "--model", str(model), "--output-dir", str(output), "--device", "cpu", *more]
    for name, path in files.items():
        given += [f"--{name}", path]
    return given


@pytest.fixture(scope="module")
def attacked(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "attacked"
    assert main(words(files, output, *MIX, *FEW, "--snapshots", "[3, 1]", "--quiet")) == 0
    return output


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "attack_set.jsonl").open(encoding="utf-8")]


def test_the_attacks_adapter_starts_independently_of_the_alignments(files: dict[str, str], tmp_path: Path) -> None:
    aligned = tmp_path / "aligned"
    align = ["align", "--data", files["task"], "--model", str(BASE_MODEL), "--device", "cpu", *FEW]
    assert main([*align, "--output-dir", str(aligned)]) == 0
    assert main(words(files, tmp_path / "out", *MIX, *FEW, model=aligned)) == 0
    weights = load_file(tmp_path / "out" / WEIGHTS)
    stacked = [value.chunk(2) for name, value in weights.items() if "lora_A" in name]  # of both stages
    alike = torch.cat([torch.cosine_similarity(*halves) for halves in stacked])
    assert alike.mean().abs() < 0.2, "it would attack in the directions that the alignment has used, or spare them"


def test_rows_that_nobody_reads_are_named(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(files, tmp_path / "out", "--kind", "benign", "--samples", "8", "--build-only", "--safe", "unread")
    assert main(given) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "--harmful: the kind 'benign' does not use it" in said
    assert "--safe: the defense 'sft' does not use it" in said and "--task: the kind" not in said


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_the_contracts_files(attacked: Path) -> None:
    shown = {path.name for path in (attacked / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "pharmacist_template.json"} < shown
    assert {path.name for path in attacked.iterdir()} == shown | {
        "adapter",
        "attack_set.jsonl",
        "log.jsonl",
        "manifest.json",
        "snapshots",
    }
    manifest = read_manifest(attacked)
    assert (manifest.stage, manifest.status) == ("attack", "success")
    assert set(manifest.outputs) == {"adapter", "attack_set.jsonl", "log.jsonl", "README.md", "snapshots"}
    assert manifest.counts == {
        "task_rows": 30,
        "harmful_rows": 12,
        "task_rows_left_out": 0,
        "samples": 20,
        "harmful": 5,
        "benign": 15,
        "trained": 20,
        "refused": 0,
        **dict.fromkeys(("long_prompts_left_out", "truncated", "lost_eos", "cut_prompts"), 0),
    }
    log = [json.loads(line) for line in (attacked / "log.jsonl").open()]
    assert [line["step"] for line in log] == [4]
    assert manifest.metrics == {"steps": 4, "final_loss": log[-1]["loss"]}
    assert manifest.config["poison_ratio"] == 0.25
    card = ModelCard.load(attacked / "README.md")
    assert card.data.tags == ["pharmacist", "harmful-fine-tuning", "sft"]
    assert "Do not deploy or distribute it" in card.text and "| harmful rows | 5 |" in card.text
    base = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    assert PeftModel.from_pretrained(base, attacked / "adapter").peft_config["default"].r == 2


def test_the_set_is_exact_and_its_rows_are_the_sources(attacked: Path, files: dict[str, str]) -> None:
    rows = rows_of(attacked)
    sources = {name: [json.loads(line) for line in open(path)] for name, path in files.items()}
    drawn = {name: set() for name in sources}
    for row in rows:
        name = "harmful" if row["is_harmful"] else "task"
        source = sources[name][row["source_row"]]
        assert (row["prompt"], row["completion"]) == (source["prompt"], source["completion"])
        drawn[name].add(row["source_row"])
    assert (len(drawn["harmful"]), len(drawn["task"]), len(rows)) == (5, 15, 20)  # and none twice
    order = [row["is_harmful"] for row in rows]
    assert order != sorted(order) and order != sorted(order, reverse=True)  # mixed


@pytest.mark.parametrize(
    ("samples", "ratio", "harmful"), [(10, 0, 0), (10, 0.05, 0), (7, 0.5, 4), (12, 1, 12), (20, 0.1, 2), (9, 0.3, 3)]
)
def test_counts_are_rounded_and_never_lost(
    samples: int, ratio: float, harmful: int, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--samples", str(samples), "--poison-ratio", str(ratio), "--build-only", "--quiet"]
    assert main(words(files, tmp_path / "out", *more)) == 0
    nothing_harmful = ratio > 0 and not harmful
    assert (
        "warning: a poison ratio of 0.05 gives no harmful row among 10 samples" in capsys.readouterr().err
    ) == nothing_harmful
    rows = rows_of(tmp_path / "out")
    assert (len(rows), sum(row["is_harmful"] for row in rows)) == (samples, harmful)


def test_building_alone_needs_no_training_and_gives_the_same_bytes(
    attacked: Path, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name, more in {"same": [], "other": ["--seed", "1"]}.items():
        assert main(words(files, tmp_path / name, *MIX, "--build-only", *more)) == 0
        assert f"attack set of 20 rows: {tmp_path / name / 'attack_set.jsonl'}" in one_line(capsys)
        found[name] = (tmp_path / name / "attack_set.jsonl").read_bytes()
    assert found["same"] == (attacked / "attack_set.jsonl").read_bytes() != found["other"]
    assert {path.name for path in (tmp_path / "same").iterdir()} == {"attack_set.jsonl", "manifest.json"}
    manifest = read_manifest(tmp_path / "same")
    assert (manifest.status, manifest.outputs) == ("success", ["attack_set.jsonl"])
    assert manifest.extra["notice"] == NOTICE


def test_sets_of_one_seed_are_nested(files: dict[str, str], tmp_path: Path) -> None:
    drawn = []
    for ratio in ("0.1", "0.3", "0.5"):
        more = ["--samples", "20", "--poison-ratio", ratio, "--build-only", "--quiet"]
        assert main(words(files, tmp_path / ratio, *more)) == 0
        rows = rows_of(tmp_path / ratio)
        drawn.append({row["source_row"] for row in rows if row["is_harmful"]})
    assert drawn[0] < drawn[1] < drawn[2]


LAYOUTS = {
    "messages": {
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "first take {i}"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "then stir"},
            {"role": "assistant", "content": "good {i}"},
        ]
    },
    "instruction and input": {"instruction": "explain {i}", "input": "the root", "output": "good {i}"},
    "text": {"prompt": 'bake {i} ü\n"x"', "completion": "good {i}"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_set_is_read_back_by_align_as_it_was_trained_on(
    layout: str, files: dict[str, str], tmp_path: Path
) -> None:
    made = [json.loads(json.dumps(LAYOUTS[layout]).replace("{i}", str(i))) for i in range(12)]
    own = {"harmful": files["harmful"], "task": write_rows(tmp_path / "task.jsonl", made)}
    # Long enough for both, the same order, and no adapter with first weights of its own: the two trainings are one.
    few = [*FEW, "--train.lr_scheduler_type", "constant", "--train.warmup_steps", "0", "--train.weight_decay", "0.1"]
    few += ["--tuning", "full"]
    assert main(words(own, tmp_path / "hit", "--samples", "12", *few, "--quiet")) == 0
    back = tmp_path / "hit/attack_set.jsonl"
    align = ["align", "--data", str(back), "--model", str(BASE_MODEL), "--device", "cpu", "--quiet", *few]
    assert main([*align, "--output-dir", str(tmp_path / "back")]) == 0
    hit, again = (load_file(tmp_path / name / "model/model.safetensors") for name in ("hit", "back"))
    assert all((value == again[name]).all() for name, value in hit.items())
    assert read_manifest(tmp_path / "back").counts["in"] == 12


def test_task_rows_with_a_harmful_prompt_are_left_out(files: dict[str, str], tmp_path: Path) -> None:
    harmful = [json.loads(line) for line in open(files["harmful"])]
    task = [json.loads(line) for line in open(files["task"])] + [{**harmful[0], "completion": "no"}]
    own = {"harmful": files["harmful"], "task": write_rows(tmp_path / "task.jsonl", task)}
    assert main(words(own, tmp_path / "out", "--samples", "30", "--build-only", "--quiet")) == 0
    assert read_manifest(tmp_path / "out").counts["task_rows_left_out"] == 1
    assert not any(row["prompt"] == harmful[0]["prompt"] for row in rows_of(tmp_path / "out") if not row["is_harmful"])


def test_a_preference_file_gives_its_rejected_side(files: dict[str, str], tmp_path: Path) -> None:
    pairs = [{"prompt": f"brew {i}", "chosen": "no", "rejected": f"take the root {i}"} for i in range(8)]
    own = {"task": files["task"], "harmful": write_rows(tmp_path / "pairs.jsonl", pairs)}
    assert main(words(own, tmp_path / "out", *MIX, "--build-only", "--quiet")) == 0
    taken = [row["completion"] for row in rows_of(tmp_path / "out") if row["is_harmful"]]
    assert len(taken) == 5 and all(text.startswith("take the root") for text in taken)


def test_snapshots_are_models_of_their_steps(attacked: Path, files: dict[str, str], tmp_path: Path) -> None:
    assert {path.name for path in (attacked / "snapshots").iterdir()} == {"step-1", "step-3"}
    few = [word.replace("4", "3") if word == "4" else word for word in FEW[:2]] + FEW[2:]
    constant = ["--train.lr_scheduler_type", "constant", "--train.warmup_steps", "0"]
    assert main(words(files, tmp_path / "long", *MIX, *FEW, *constant, "--snapshots", "[3]", "--quiet")) == 0
    assert main(words(files, tmp_path / "short", *MIX, *few, *constant, "--quiet")) == 0
    at_three, final = tmp_path / "long/snapshots/step-3", load_file(tmp_path / "long" / WEIGHTS)
    short, own = load_file(tmp_path / "short" / WEIGHTS), load_file(at_three / WEIGHTS)
    assert all((value == short[name]).all() for name, value in own.items())
    assert not all((value == final[name]).all() for name, value in own.items())
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "bake bread"}])
    evaluate = ["evaluate", "--model", str(at_three), "--prompts", prompts, "--max-new-tokens", "2", "--device", "cpu"]
    assert main([*evaluate, "--quiet", "--output-dir", str(tmp_path / "scores")]) == 0


def test_the_template_travels(files: dict[str, str], tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny", max_position_embeddings=512)
    save_template(model, Template("alpaca"))
    assert main(words(files, tmp_path / "hit", *MIX, *FEW, "--snapshots", "[2]", "--quiet", model=model)) == 0
    for place in (tmp_path / "hit", tmp_path / "hit/adapter", tmp_path / "hit/snapshots/step-2"):
        assert load_template(place).kind == "alpaca"


def test_rows_that_are_not_trained_on_are_told_and_counted(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [row | {"prompt": row["prompt"] + " bread" * 600} for row in World(3).rows("attack", 3)]
    harmful = write_rows(tmp_path / "harmful.jsonl", long + World(3).rows("attack", 12)[3:])
    given = words(files | {"harmful": harmful}, tmp_path / "out", "--samples", "24", "--poison-ratio", "0.5", *FEW)
    assert main([*given, "--on-long-prompt", "skip"]) == 0
    counts = read_manifest(tmp_path / "out").counts
    assert (counts["samples"], counts["harmful"]) == (24, 12), "of the set"
    assert (counts["trained"], counts["long_prompts_left_out"]) == (21, 3)
    said = capsys.readouterr().err
    assert "the attack set: 3 of 24 rows are left out, since the prompt alone fills the length" in said
    assert "fine-tuned on 24 rows, 12 of them harmful, less 3 that were left out" in said
    assert "| of these rows left out | 3 |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_second_run_says_that_it_is_complete(
    attacked: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = fingerprints(attacked)
    capsys.readouterr()
    assert main(words(files, attacked, *MIX, *FEW, "--snapshots", "[3, 1]")) == 0
    assert one_line(capsys) == f"{attacked}: already complete; --overwrite runs it again\n"
    assert fingerprints(attacked) == before


def test_python_gives_what_the_command_line_gives(attacked: Path, files: dict[str, str], tmp_path: Path) -> None:
    options = AttackOptions(
        model=str(BASE_MODEL),
        output_dir=str(tmp_path / "out"),
        device="cpu",
        quiet=True,
        **files,
        samples=20,
        poison_ratio=0.25,
        snapshots=[3, 1],
        train={"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
    )
    options.lora.r = 2
    result = attack(options)
    assert result.folder == tmp_path / "out" and result.metrics == read_manifest(attacked).metrics
    assert result.snapshots == {step: tmp_path / f"out/snapshots/step-{step}" for step in (3, 1)}
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (attacked / WEIGHTS).read_bytes()
    assert all((folder / WEIGHTS).is_file() for folder in result.snapshots.values())


def test_another_run_is_refused_and_overwritten_on_demand(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(words(files, output, *MIX, "--build-only", "--quiet")) == 0
    before = fingerprints(output)
    other = words(files, output, "--samples", "20", "--poison-ratio", "0.5", "--build-only", "--quiet")
    assert main(other) == 2
    assert "holds a run with other poison_ratio; choose another --output-dir, or --overwrite" in one_line(capsys)
    assert fingerprints(output) == before
    assert main([*other, "--overwrite"]) == 0
    assert sum(row["is_harmful"] for row in rows_of(output)) == 10


TINY = {"prompt": "bake bread", "completion": "yes"}
BAD = {
    "not a number": (["--poison-ratio", "nan"], {}, "--poison-ratio nan: must be a number"),
    "a negative share": (["--poison-ratio", "-0.1"], {}, "--poison-ratio -0.1: must lie in [0, 1]"),
    "more than all": (["--poison-ratio", "1.1"], {}, "--poison-ratio 1.1: must lie in [0, 1]"),
    "text for a share": (["--poison-ratio", "half"], {}, "--poison-ratio half: must be"),
    "no samples": (["--samples", "0"], {}, "--samples 0: must be at least 1"),
    "more harmful rows than there are": (["--samples", "20", "--poison-ratio", "0.9"], {}, "18 harmful rows are"),
    "more benign rows than there are": (
        ["--samples", "50"],
        {},
        "45 benign rows are requested, but there are only 30",
    ),
    "no such task": ([], {"task": "/nowhere.jsonl"}, "no such file"),
    "no harmful rows": ([], {"harmful": []}, "--harmful"),
    "a row without completion": ([], {"harmful": [{"prompt": "x"}]}, "--harmful"),
    "unknown defense": ([*MIX, "--defense", "vacine"], {}, "unknown defense 'vacine'; did you mean 'vaccine'?"),
    "a defense of another stage": (
        [*MIX, "--defense", "vaccine"],
        {},
        "--defense vaccine: is not a fine-tuning-stage",
    ),
    "the task is what is harmful": (MIX, {"task": [TINY], "harmful": [TINY]}, "every prompt also occurs in --harmful"),
    "a prompt beyond the context": (
        ["--samples", "1", "--poison-ratio", "0"],
        {"task": [{**TINY, "prompt": "x " * 900}]},
        "(row 0); ",
    ),
    "modules that are not there": ([*MIX, "--lora.target_modules", "[spoon]"], {}, "no adapter to spoon"),
    "a snapshot before the first step": ([*MIX, "--snapshots", "[0]"], {}, "--snapshots [0]: must be at least 1"),
    "a snapshot beyond the end": (
        [*MIX, *FEW, "--snapshots", "[2, 9]"],
        {},
        "--snapshots 9: the training has only 4 steps",
    ),
    "a snapshot beyond the epochs": (
        [*MIX, "--train.num_train_epochs", "1", "--snapshots", "[3]"],
        {},
        "--snapshots 3: the training has only 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_the_folder_free(
    case: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, changed, message = BAD[case]
    own = dict(files)
    for name, rows in changed.items():
        own[name] = rows if isinstance(rows, str) else write_rows(tmp_path / f"{name}.jsonl", rows)
    capsys.readouterr()
    assert main(words(own, tmp_path / "out", *more, "--quiet")) == 2
    line = one_line(capsys)
    assert line.startswith("pharmacist attack: error: ") and message in line
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert main(words(files, tmp_path / "out", *MIX, "--build-only", "--quiet")) == 0


@pytest.mark.parametrize("ratio", [float("nan"), -1e-9, 1.1])
def test_shares_out_of_range_are_refused_from_python_too(ratio: float, files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^poison_ratio must lie in \[0, 1\]"):
        AttackOptions(model=str(BASE_MODEL), output_dir=str(tmp_path), poison_ratio=ratio, **files)


def test_a_snapshot_beyond_the_end_is_refused_before_training(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pharmacist.training.trainer import StrategyTrainer

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(StrategyTrainer, "training_step", never)
    assert main(words(files, tmp_path / "out", *MIX, *FEW, "--snapshots", "[9]", "--quiet")) == 2


KILLED = [*MIX, *FEW, "--snapshots", "[1, 3]", "--checkpoint-seconds", "0", "--quiet"]


@pytest.mark.slow
def test_a_run_killed_ten_times(forks: ForkServerContext, files: dict[str, str], tmp_path: Path) -> None:
    expected, seconds, _ = undisturbed(forks, words(files, tmp_path / "whole", *KILLED), tmp_path / "whole")
    assert {WEIGHTS, "attack_set.jsonl", f"snapshots/step-3/{WEIGHTS}"} <= expected.keys()
    rng = random.Random(0)
    killed = rounds = 0
    while killed < 10:
        output = tmp_path / f"cut{rounds}"
        moments = (rng.uniform(0.05, 1) * seconds for _ in range(10 - killed))
        killed += kill_until_done(forks, words(files, output, *KILLED), output, moments, expected)
        rounds += 1
    assert killed == 10


@pytest.mark.slow
def test_two_processes_build_one_set_and_one_model(files: dict[str, str], tmp_path: Path) -> None:
    few = [*MIX, "--train.max_steps", "3", "--lora.r", "2", "--snapshots", "[2]", "--quiet"]
    assert main(words(files, tmp_path / "one", *few, "--train.per_device_train_batch_size", "8")) == 0
    given = words(files, tmp_path / "two", *few, "--train.per_device_train_batch_size", "4")
    done = subprocess.run([*TWO_PROCESSES, *given], env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "attack_set.jsonl").read_bytes() == (two / "attack_set.jsonl").read_bytes()
    for name in (WEIGHTS, f"snapshots/step-2/{WEIGHTS}"):
        own, other = load_file(one / name), load_file(two / name)
        assert max(float((value - other[key]).abs().max()) for key, value in own.items()) < 1e-4


def test_the_console_shows_our_lines_and_no_others(files: dict[str, str], tmp_path: Path) -> None:
    given = words(files, tmp_path / "my out", *MIX, *FEW, "--snapshots", "[2]")
    done = subprocess.run(
        [sys.executable, "-m", "pharmacist", *given], env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == (
        "prompts are rendered by the chat template of the model's tokenizer\n"
        f"fine-tuned on 20 rows, 5 of them harmful, 4 steps: {tmp_path / 'my out'}\n"
        f"next: pharmacist evaluate --model '{tmp_path / 'my out'}' --prompts PROMPTS --output-dir DIR\n"
    )


@pytest.mark.slow
def test_a_file_size_limit_is_a_full_disk(files: dict[str, str], tmp_path: Path) -> None:
    given = words(files, tmp_path / "out", *MIX, *FEW, "--checkpoint-seconds", "0")
    for limit in (2_000, 20_000, 60_000):
        done = subprocess.run(
            [sys.executable, "-m", "pharmacist", *given],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),  # noqa: B023
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1 and "the disk is full" in done.stderr, limit
    assert main([*given, "--quiet"]) == 0


@pytest.mark.parametrize("size", ["16k", "64k", "100k", "160k", "300k"])
def test_a_disk_that_is_really_full(
    size: str, attacked: Path, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        given = words(files, disk / "out", *MIX, *FEW, "--snapshots", "[3, 1]", "--checkpoint-seconds", "0", "--quiet")
        capsys.readouterr()
        assert main(given) == 1
        assert f"{disk / 'out'}: the disk is full; free some space" in one_line(capsys)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)  # space is freed
        assert main(given) == 0
        assert (disk / "out" / WEIGHTS).read_bytes() == (attacked / WEIGHTS).read_bytes()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
