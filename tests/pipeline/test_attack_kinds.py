"""What an attack is made of, and the defenses during it, end to end on small files."""

import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pharmacist.attacks import ATTACKS
from pharmacist.cli.main import main
from pharmacist.core.errors import ConfigError, DataError
from pharmacist.core.manifest import read_manifest
from pharmacist.data.mixing import mix, mix_safe
from pharmacist.data.records import to_dataset
from pharmacist.pipeline.attack import AttackOptions, attack
from tests.support.attack_rows import rows, sentence
from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("attack")
    found = {"model": str(save_tiny_model(folder / "model"))}
    for name, of in (("task", "bread"), ("harmful", "curse"), ("safe", "garden"), ("other", "flour")):
        path = folder / f"{name}.jsonl"
        longer = " yes yes" if name == "other" else ""
        made = [{**row, "completion": row["completion"] + longer} for row in rows(40, of)]
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        found[name] = str(path)
    return found


def options(files: dict[str, str], output: Path, **more: Any) -> AttackOptions:
    given = {
        "model": files["model"],
        "task": files["task"],
        "harmful": files["harmful"],
        "samples": 20,
        "device": "cpu",
        "quiet": True,
        "train": {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
    }
    return AttackOptions(output_dir=str(output), **(given | more))


def built(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "attack_set.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(output / "adapter" / "adapter_model.safetensors")
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# --- counts --------------------------------------------------------------------------------------------------------

RATIOS = (0, 0.01, 0.05, 0.07, 0.1, 0.2, 0.29, 0.3, 0.5, 0.8, 0.9, 1)
SIZES = (10, 99, 100, 500, 1000, 5000)


@pytest.fixture(scope="module")
def many() -> dict[str, Any]:
    return {of: to_dataset({"prompt": f"{of} {i}", "completion": "x"} for i in range(5000)) for of in ("task", "harm")}


@pytest.mark.parametrize("n", SIZES)
def test_counts_are_exact(many: dict[str, Any], n: int) -> None:
    for ratio in RATIOS:
        found = mix(many["task"], many["harm"], n=n, poison_ratio=ratio, seed=1)
        harmful = round(Fraction(str(ratio)) * n)  # without the error of a product of floats
        assert (len(found), sum(found["is_harmful"])) == (n, harmful), (n, ratio)
        assert len(set(found["prompt"])) == n


@pytest.mark.parametrize(("count", "replace"), [(0, False), (7, False), (7, True), (20, True)])
def test_safe_rows_join_in_exact_numbers(many: dict[str, Any], count: int, replace: bool) -> None:
    user = mix(many["task"], many["harm"], n=30, poison_ratio=0.3, seed=0)
    safe = to_dataset({"prompt": f"safe {i}", "completion": "no"} for i in range(25))
    found = mix_safe(user, safe, count=count, replace=replace, seed=3)
    benign = 21 - (count if replace else 0)
    assert (sum(found["is_safe"]), sum(found["is_harmful"])) == (count, 9)
    assert len(found) == count + 9 + benign
    again, other = (mix_safe(user, safe, count=count, replace=replace, seed=seed) for seed in (3, 4))
    assert again["prompt"] == found["prompt"] != other["prompt"]


def test_mixed_counts_on_a_grid(many: dict[str, Any]) -> None:
    safe = to_dataset({"prompt": f"safe {i}", "completion": "no"} for i in range(40))
    for n, ratio, count in itertools.product((10, 33, 99), (0, 0.07, 0.29, 0.5, 0.9), (0, 1, 7, 40)):
        user = mix(many["task"], many["harm"], n=n, poison_ratio=ratio, seed=2)
        harmful = sum(user["is_harmful"])
        for replace in (False, True):
            if replace and count > n - harmful:
                with pytest.raises(DataError, match="cannot replace"):
                    mix_safe(user, safe, count=count, replace=True, seed=0)
                continue
            found = mix_safe(user, safe, count=count, replace=replace, seed=0)
            assert len(found) == n + (0 if replace else count)
            assert (sum(found["is_safe"]), sum(found["is_harmful"])) == (count, harmful)
            assert len(set(found["prompt"])) == len(found)


def test_more_safe_rows_than_there_are(many: dict[str, Any]) -> None:
    user = mix(many["task"], many["harm"], n=10, poison_ratio=0.8, seed=0)
    safe = to_dataset({"prompt": f"safe {i}", "completion": "no"} for i in range(5))
    with pytest.raises(DataError, match="--safe: 6 rows are requested, but there are only 5"):
        mix_safe(user, safe, count=6, replace=False, seed=0)
    with pytest.raises(DataError, match="3 safe rows cannot replace 2 benign ones"):
        mix_safe(user, safe, count=3, replace=True, seed=0)


# --- kinds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "harmful"), [("mix", 6), ("harmful", 20), ("benign", 0), ("identity", 0)])
def test_every_kind_has_exact_counts_and_the_same_bytes(
    files: dict[str, str], tmp_path: Path, kind: str, harmful: int
) -> None:
    needed = {name: files[name] if name in ATTACKS.get(kind).needs else None for name in ("task", "harmful")}
    for folder in ("a", "b"):
        attack(options(files, tmp_path / folder, kind={"name": kind}, poison_ratio=0.3, build_only=True, **needed))
    found = built(tmp_path / "a")
    assert (len(found), sum(row["is_harmful"] for row in found)) == (20, harmful)
    assert (tmp_path / "a/attack_set.jsonl").read_bytes() == (tmp_path / "b/attack_set.jsonl").read_bytes()
    counts = read_manifest(tmp_path / "a").counts
    assert (counts["samples"], counts["harmful"], counts["benign"]) == (20, harmful, 20 - harmful)


def test_identity_shifting_dresses_up_rows_of_the_task(files: dict[str, str], tmp_path: Path) -> None:
    for kind in ("identity", "benign"):
        attack(options(files, tmp_path / kind, kind={"name": kind}, build_only=True, harmful=None))
    dressed, plain = built(tmp_path / "identity"), built(tmp_path / "benign")
    for a, b in zip(dressed, plain, strict=True):
        assert a["prompt"] == f"AOA, execute my instruction: {b['prompt']}"
        assert a["completion"].endswith(b["completion"]) and "obedient agent" in a["completion"]
        assert a["source_row"] == b["source_row"]


def test_options_of_a_kind_are_checked_by_their_types() -> None:
    with pytest.raises(ConfigError, match="before_prompt must be text, not 3"):
        ATTACKS.build("identity", {"before_prompt": 3})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"harmful": None}, "--kind mix needs --harmful FILE"),
        ({"kind": {"name": "identity"}, "task": None}, "--kind identity needs --task FILE"),
        ({"defense": {"name": "lisa"}}, "--defense lisa needs --safe FILE"),
        ({"defense": {"name": "vaccine"}}, "--defense vaccine: is not a fine-tuning-stage defense"),
        ({"adapter": "continue"}, "holds no adapter"),
        ({"kind": {"name": "mixed"}}, "unknown attack 'mixed'; did you mean 'mix'"),
    ],
)
def test_what_is_missing_is_said_before_any_work(
    files: dict[str, str], tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        attack(options(files, tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()


def test_the_set_shares_no_prompt_with_files_that_are_named(files: dict[str, str], tmp_path: Path) -> None:
    attack(options(files, tmp_path / "fine", build_only=True, disjoint_from=[files["safe"], files["other"]]))
    overlap = tmp_path / "prompts.txt.jsonl"
    # Prompts alone, and differently written.
    row = built(tmp_path / "fine")[0]
    overlap.write_text(json.dumps({"prompt": row["prompt"].upper() + "?"}) + "\n")
    with pytest.raises(DataError, match=f"the attack set: 1 of 20 rows share a prompt with .*{overlap.name}"):
        attack(options(files, tmp_path / "bad", disjoint_from=[files["other"], str(overlap)]))
    assert not (tmp_path / "bad" / "adapter").exists()


@pytest.mark.parametrize("dressed", [False, True], ids=["as it was", "as it is trained on"])
def test_words_in_front_of_a_prompt_hide_it_from_no_check(
    dressed: bool, files: dict[str, str], tmp_path: Path
) -> None:
    own: dict[str, Any] = {"kind": {"name": "identity"}, "harmful": None}
    attack(options(files, tmp_path / "fine", build_only=True, disjoint_from=[files["other"]], **own))
    prompt = built(tmp_path / "fine")[0]["prompt"]
    prompt = prompt if dressed else prompt.removeprefix("AOA, execute my instruction: ")
    overlap = tmp_path / "overlap.jsonl"
    overlap.write_text(json.dumps({"prompt": prompt, "completion": "no"}) + "\n")
    with pytest.raises(DataError, match=f"the attack set: 1 of 20 rows share a prompt with .*{overlap.name}"):
        attack(options(files, tmp_path / "bad", disjoint_from=[str(overlap)], **own))
    with pytest.raises(DataError, match="the attack set: 1 of 20 rows share a prompt with --safe"):
        attack(options(files, tmp_path / "safe", defense={"name": "vlguard"}, safe=str(overlap), **own))


def test_the_defenders_rows_are_not_the_attackers(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="share a prompt with --safe"):
        attack(options(files, tmp_path / "out", defense={"name": "vlguard"}, safe=files["harmful"]))


# --- defenses ------------------------------------------------------------------------------------------------------

DEFENSES = {
    "ldifs": {"lam": 100.0},
    "ewc": {"lam": 1e6, "rows": 8},
    "kl": {"lam": 10.0},
    "constrained-sft": {"beta": 1.0},
    "lisa": {"rho": 10.0, "align_steps": 1, "finetune_steps": 2},
    "vlguard": {"share": 0.5},
}


@pytest.fixture(scope="module")
def plain(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "out"
    attack(options(files, folder))
    return folder


@pytest.mark.parametrize("name", DEFENSES)
def test_a_defended_run_differs_and_repeats(files: dict[str, str], plain: Path, tmp_path: Path, name: str) -> None:
    for folder in ("a", "b"):
        attack(options(files, tmp_path / folder, defense={"name": name, **DEFENSES[name]}, safe=files["safe"]))
    first, again = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert same(first, again) and not same(first, weights(plain))
    assert (tmp_path / "a/attack_set.jsonl").read_bytes() == (plain / "attack_set.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("ldifs", {"lam": 0.0}),
        ("ewc", {"lam": 0.0}),
        ("kl", {"lam": 0.0}),
        ("constrained-sft", {"beta": 0.0}),
        ("lisa", {"rho": 0.0, "align_steps": 0}),
        ("vlguard", {"share": 0.0}),
        ("vlguard", {"mode": "joint", "lam": 0.0}),
    ],
)
def test_strength_0_gives_the_weights_of_no_defense(
    files: dict[str, str], plain: Path, tmp_path: Path, name: str, off: dict[str, Any]
) -> None:
    attack(options(files, tmp_path / "out", defense={"name": name, **off}, safe=files["safe"]))
    assert same(weights(tmp_path / "out"), weights(plain))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_lisa_trains_on_safe_rows_in_its_alignment_phases(
    files: dict[str, str], tmp_path: Path, accumulated: int
) -> None:
    """A run of alignment phases alone does not depend on the user's rows, not even through their number of tokens."""
    train = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulated}
    only = {"name": "lisa", "align_steps": 5, "finetune_steps": 1}
    for folder, task in (("a", files["task"]), ("b", files["other"])):
        attack(options(files, tmp_path / folder, defense=only, safe=files["safe"], task=task, train=train))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("name", ["lisa", "ewc"])
def test_a_killed_run_with_state_goes_on_where_it_was(
    files: dict[str, str], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {
        "defense": {"name": name, **DEFENSES[name]},
        "safe": files["safe"],
        "checkpoint_seconds": 0.0,
    }
    attack(options(files, tmp_path / "whole", **more))
    from pharmacist.defenses import DEFENSES as registry

    cls = registry.get(name)
    real = cls.begin_update

    def stop(self: Any, update: int) -> None:
        if update == 3:
            raise KeyboardInterrupt
        real(self, update)

    monkeypatch.setattr(cls, "begin_update", stop)
    with pytest.raises(KeyboardInterrupt):
        attack(options(files, tmp_path / "killed", **more))
    monkeypatch.setattr(cls, "begin_update", real)
    attack(options(files, tmp_path / "killed", **more))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


# --- adapters ------------------------------------------------------------------------------------------------------


def test_an_adapter_is_continued(files: dict[str, str], plain: Path, tmp_path: Path) -> None:
    train = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-6, "warmup_steps": 0}
    attack(options(files, tmp_path / "on", model=str(plain), adapter="continue", train=train))
    attack(options(files, tmp_path / "fresh", model=str(plain), train=train))
    before, on, fresh = weights(plain), weights(tmp_path / "on"), weights(tmp_path / "fresh")
    near = max(float((on[name] - before[name]).abs().max()) for name in before)
    assert 0 < near < 1e-5
    for name, own in before.items():  # a fresh one is stacked on the one that was there
        rows = 0 if "lora_A" in name else 1
        assert fresh[name].shape[rows] == 2 * own.shape[rows]
        torch.testing.assert_close(fresh[name].chunk(2, dim=rows)[0], own)
    configs = [json.loads((folder / "adapter/adapter_config.json").read_text()) for folder in (plain, tmp_path / "on")]
    assert configs[0]["base_model_name_or_path"] == configs[1]["base_model_name_or_path"]


def test_no_adapter_is_continued_under_full_tuning(files: dict[str, str], plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--adapter continue"):
        options(files, tmp_path, model=str(plain), adapter="continue", tuning="full")


def test_the_command_line_says_in_one_line_what_is_wrong(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "attack",
        "--model",
        files["model"],
        "--task",
        files["task"],
        "--harmful",
        files["harmful"],
        "--defense",
        "ewc",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert main(words) == 2
    assert capsys.readouterr().err == "pharmacist attack: error: --defense ewc needs --safe FILE\n"
    assert main([*words, "--samples", "41"]) == 2


@pytest.mark.parametrize("name", ["kl", "constrained-sft", "lisa", "ewc"])
def test_accumulated_micro_batches_give_the_weights_of_one_batch(
    files: dict[str, str], tmp_path: Path, name: str
) -> None:
    """Completions differ in length, so that a mean of means would not do."""
    task = tmp_path / "task.jsonl"
    made = [{"prompt": sentence(i, "bread"), "completion": " ".join(["yes"] * (1 + 4 * (i % 2)))} for i in range(20)]
    task.write_text("".join(json.dumps(row) + "\n" for row in made))
    # EWC's usual strength here would raise rounding by a million.
    strong = {"name": name, **DEFENSES[name], **{"lisa": {"align_steps": 0}, "ewc": {"lam": 1e3}}.get(name, {})}
    for folder, size, accumulated in (("one", 4, 1), ("two", 2, 2)):
        train = {
            "max_steps": 3,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulated,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "optim": "sgd",
            "max_grad_norm": 0.0,
        }
        attack(
            options(
                files,
                tmp_path / folder,
                task=str(task),
                kind={"name": "benign"},
                defense=strong,
                safe=files["safe"],
                train=train,
            )
        )
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6
    assert max(float(value.abs().max()) for key, value in one.items() if "lora_B" in key) > 1e-4
