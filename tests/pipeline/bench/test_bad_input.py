"""What cannot be in a grid is told in one line, before anything runs or is written."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from pharmacist.cli.main import main
from pharmacist.core.files import read_json, write_json
from pharmacist.core.manifest import read_manifest
from tests.support.bench_fakes import Stages
from tests.support.grids import SMALL, write_grid
from tests.support.world_files import write_rows


WITHOUT_PROMPTS: dict[str, Any] = {"evaluate": {"benign_prompts": "world:borderline:5"}}
LABELLED_POOL: dict[str, Any] = {"name": "pool", "pool": "world", "rows": 60, "labels": __file__}
POOLS = {"a": "safe", "b": "utility", "c": "safe"}
"""Pools, and the sets of their safe references."""
FILE_POOL: dict[str, Any] = {"pools": [{"pool": "rows.jsonl"}]}


def own(axis: str, key: str, value: str, **options: Any) -> dict[str, Any]:
    """A grid with one entry on an axis, which has options of its own."""
    return {axis: [{"name": "own", key: value, "options": options}]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"defences": ["sft"]}, "unknown key 'defences'; did you mean 'defenses'?"),
        ({"defenses": ["vacine"]}, "defenses, entry 1: unknown defense 'vacine'; did you mean 'vaccine'?"),
        (
            {"defenses": ["sft", {"defense": {"name": "vaccine", "roh": 1}}]},
            "defenses, entry 2: unknown key 'defense.roh'; did you mean 'defense.rho'?",
        ),
        ({"defenses": ["sft", "sft"]}, "another entry is also called 'sft'"),
        ({"defenses": [3]}, "defenses, entry 1: unknown defense '3'"),
        ({"defenses": [["sft"]]}, "defenses, entry 1: needs a name, or keys and values"),
        ({"defenses": ["lisa"]}, "is not an alignment-stage defense; list it under post_alignment_defenses"),
        ({"defenses": ["repnoise"]}, "'repnoise' needs harmful rows: give 'harmful' under align, such as world"),
        (FILE_POOL | {"defenses": ["booster"]}, "'booster' needs harmful rows: give 'harmful' under align"),
        (
            {"pools": [{"pool": "rows.jsonl", "harmful": "h.jsonl"}], "defenses": ["booster"]},
            "give 'harmful' under align; those of pool 'rows' are for selectors",
        ),
        (FILE_POOL | {"selectors": ["pharmacist"]}, "needs safe references: give pool 'rows' a 'safe'"),
        (FILE_POOL | {"align": {"harmful": "world:answers"}, "defenses": ["booster"]}, "synthetic pool"),
        ({"align": {"trian": {}}}, "align: unknown key 'trian'; did you mean 'train'?"),
        ({"align": {"train": {"lerning_rate": 1}}}, "no such field; did you mean 'learning_rate'?"),
        ({"align": {"seed": 1}}, "align: 'seed' is decided by the grid"),
        ({"attack": {"poison_ratio": 1}}, "attack: 'poison_ratio' is decided by the grid"),
        ({"attack": {"poison-ratio": 1}}, "attack: 'poison-ratio' is decided by the grid"),
        ({"curate": {"safe": "rows.jsonl"}}, "curate: 'safe' is decided by the grid"),
        ({"curate": {"top": 0.7}}, "curate: 'top' is decided by the grid"),
        (
            {"selectors": ["k-center"], "curate": {"embedder": "./nowhere"}},
            "curate: embedder ./nowhere: no such file; check the path",
        ),
        ({"align": {"on-bad-row": "skip", "on_bad_row": "fail"}}, "'on_bad_row' is given twice, once with a hyphen"),
        (own("defenses", "defense", "sft", seed=3), "defenses, entry 1: options: 'seed' is decided by the grid"),
        (own("defenses", "defense", "sft", device="cuda"), "options: 'device' is decided by the grid"),
        (own("selectors", "selector", "random", top_k=5), "options: 'top_k' is decided by the grid"),
        (own("attacks", "kind", "mix", **{"poison-ratio": 0.9}), "options: 'poison-ratio' is decided by the grid"),
        (own("judges", "judge", "keyword", safe="rows.jsonl"), "judges, entry 1: options: 'safe' is decided"),
        (own("tasks", "train", "world:task:40", judge="probe"), "tasks, entry 1: options: 'judge' is decided"),
        (own("post_alignment_defenses", "method", "lisa", samples=5), "options: 'samples' is decided by the grid"),
        (own("post_alignment_defenses", "method", "safe-lora", aligned="x"), "options: 'aligned' is decided"),
        (
            own("post_alignment_defenses", "method", "none", merge=True),
            "'own' is no defense, so options have no effect",
        ),
        ({"pools": [{"pool": "world", "rows": -5}]}, "--rows -5: must be at least 1"),
        (
            {"pools": [{"pool": "world", "kind": "clean", "mislabel": 0.3}]},
            "'mislabel' only applies to the kind planted",
        ),
        ({"seed": 7, "seeds": [0, 1]}, "--seed 7: the grid names its seeds"),
        (
            {"pools": [{"pool": "rows.jsonl", "rows": 7}]},
            "'rows' only applies to a synthetic pool, and rows.jsonl is not one",
        ),
        ({"evaluate": {"prompts": "world:prompts:²"}}, "'²' is not a number of rows"),
        ({"pools": ["rows.jsonl/" + "a" * 300 + ".jsonl"]}, "no such file; check the path"),
        ({"pools": ["."]}, "curate: pool .: is a directory without a saved dataset"),
        ({"align": {"max_length": 64}}, "align: 'max_length' is decided by the entries of models; give it there"),
        ({"attack": {}}, "attack 'mix' needs harmful rows: give 'harmful' under attack"),
        ({"tasks": [{"name": "nothing"}]}, "give task 'nothing' a 'train'"),
        ({"attacks": [{"kind": "mix", "poison_ratio": [0.1, 0.1]}]}, "needs one or more values, all different"),
        ({"attacks": [{"kind": "mix", "poison_ratio": 7}]}, "must lie in [0, 1]"),
        (
            {"attacks": [{"kind": "harmful", "poison_ratio": [0.1, 0.2]}]},
            "attack 'harmful': poison_ratio: the kind harmful has a fixed ratio, 1; leave it out",
        ),
        ({"post_alignment_defenses": ["antidote"]}, "'antidote' needs harmful rows: give 'harmful' under repair"),
        ({"judges": ["strongreject"]}, "--judge strongreject: give the endpoint's address"),
        ({"evaluate": SMALL["evaluate"] | {"lm_eval": "no-such-task"}}, "--lm-eval"),
        ({"judges": ["probe"]}, "judge 'probe' needs harmful references: give it a 'harmful'"),
        (WITHOUT_PROMPTS, "'prompts' must name the harmful prompts"),
        ({"evaluate": {"prompts": "world:promts"}}, "no set 'promts'; did you mean 'prompts'?"),
        ({"evaluate": {"prompts": "nowhere.jsonl"}}, "nowhere.jsonl: no such file"),
        ({"evaluate": {"prompts": "my/own/prompts"}}, "evaluate: prompts my/own/prompts: no such file"),
        ({"models": [{"model": "./nowhere"}]}, "no such folder"),
        ({"selectors": [{"selector": "full", "fractions": [0.3]}]}, "keeps the full pool"),
        ({"selectors": [{"selector": "random", "weighted": True}]}, "has no weights"),
        ({"selectors": [{"selector": "random", "pools": ["pol"]}]}, "there is no pool 'pol'; did you mean 'pool'?"),
        ({"defenses": [{"defense": "sft", "selectors": ["ful"]}]}, "there is no selector 'ful'; did you mean 'full'?"),
        (
            {"selectors": [{"selector": "pharmacist", "labels": 8}]},
            "selector 'pharmacist' needs labels, and pool 'pool' has none",
        ),
        (
            {"selectors": [{"selector": "random", "labels": 8}], "pools": [LABELLED_POOL]},
            "must be all, or at least 2 with a selector that asks for labels",
        ),
        (
            {"selectors": [{"selector": "random", "labels": "all"}], "pools": [LABELLED_POOL | {"labels": "no.json"}]},
            "no.json: no such file",
        ),
        ({"align": {"weights": "w.parquet"}}, "'weights' is decided by the grid"),
        ({"selectors": [{"name": "random", "options": {"diversity": "k-center"}}]}, "use the selector k-center"),
        ({"fractions": [0.0]}, "--fractions [0.0]: must lie in (0, 1]"),
        (
            {"selectors": [{"selector": "random", "fractions": [1.5]}]},
            "selectors, entry 1: --fractions [1.5]: must lie in (0, 1]",
        ),
        ({"seeds": [1, 1]}, "seeds [1, 1]: needs one or more values, all different"),
        ({"seeds": []}, "seeds []: needs one or more values, all different"),
        ({"models": []}, "models: must name at least one"),
        ({"executor": "rai"}, "unknown executor 'rai'; did you mean 'ray'?"),
        ({"only": "nobody"}, "--only 'nobody': matches no cell"),
    ],
    ids=str,
)
def test_told_in_one_line_before_any_work(
    changes: dict[str, Any],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    grid = write_grid(tmp_path / "grid.yaml", **changes)
    assert main(["bench", "--config", str(grid), "--output-dir", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert words in text
    assert not (tmp_path / "out").exists()


def test_an_address_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = write_grid(tmp_path / "grid.yaml")
    for command in (["bench", "--config", str(grid)], ["demo"]):
        assert main([*command, "--output-dir", "s3://bucket/name"]) == 2
        assert "--output-dir s3://bucket/name: must be a folder" in capsys.readouterr().err


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_what_cannot_be_the_folder_of_a_grid(
    dry: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write_grid(tmp_path / "grid.yaml")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    for place, words in ((grid, "is a file; --output-dir needs a folder"), (tmp_path / "thesis", "do not belong to")):
        assert main(["bench", "--config", str(grid), "--output-dir", str(place), *dry]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and f"{place}: " in text and words in text


def test_folders_that_hold_something_else(stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--config", str(write_grid(tmp_path / "grid.yaml")), "--output-dir", str(tmp_path / "out")]
    assert main(words) == 0
    manifest = next((tmp_path / "out" / "stages").glob("align-*/manifest.json"))
    for path in (manifest, tmp_path / "out" / "manifest.json"):
        before = read_json(path)
        write_json(path, before | {"schema_version": 99})
        capsys.readouterr()
        stages.began()
        assert main(words) == 2
        text = capsys.readouterr().err
        assert "written by a newer version of pharmacist" in text
        assert text.count("\n") == 1
        assert stages.began() == {}
        write_json(path, before)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    assert main([*words[:-1], str(tmp_path / "other")]) == 2
    assert "contains files that do not belong to a pharmacist run" in capsys.readouterr().err


def test_the_small_grid_itself_is_fine(stages: Stages, tmp_path: Path) -> None:
    assert (
        main(["bench", "--config", str(write_grid(tmp_path / "g.yaml")), "--output-dir", str(tmp_path / "out")]) == 0
    )
    assert set(SMALL) <= set(read_json(tmp_path / "out" / "manifest.json")["config"])


def test_a_judge_that_learns_what_selectors_learn_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"judge": "probe", "harmful": "world:judge-harmful", "utility": "world:judge-utility"}
    pools = [{"name": name, "pool": "world", "rows": 60, "safe": f"world:{safe}"} for name, safe in POOLS.items()]
    for safe, told in (("world:safe", 1), ("world:judge-safe", 0)):
        grid = write_grid(tmp_path / "grid.yaml", judges=["keyword", own | {"safe": safe}], pools=pools)
        assert main(["bench", "--config", str(grid), "--output-dir", str(tmp_path / "out"), "--dry-run"]) == 0
        text = " ".join(capsys.readouterr().err.split())
        assert text.count("warning: judge 'probe' learns from references of pool 'a', 'c' (world:safe)") == told
        assert text.count("learns from references") == told
    assert not (tmp_path / "out").exists()


def test_prompts_of_the_evaluation_on_which_an_attack_trains_are_told(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"attack": "moss fern reed", "task": "bread water", "prompts": "fern oven reed", "test": "oven Water?"}
    files = {name: str(tmp_path / f"{name}.jsonl") for name in words}
    for name, path in files.items():
        rows = [
            {"prompt": f"tell of {word}", "completion": "no", "kept": word != "reed"} for word in words[name].split()
        ]
        write_rows(Path(path), rows)
    changes: dict[str, Any] = {
        "attack": {"harmful": files["attack"], "where": ["harmful:kept=true"]},
        "evaluate": {"prompts": files["prompts"]},
        "tasks": [{"name": "reviews", "train": files["task"], "test": files["test"]}],
    }
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    line = ["bench", "--config", str(grid), "--output-dir", str(out)]
    write_grid(grid, **changes)
    for more in (["--dry-run"], []):
        assert main([*line, *more]) == 0
        warnings = [text for text in capsys.readouterr().err.splitlines() if text.startswith("warning")]
        assert len(warnings) == 2  # not one for each cell
        assert f"prompts {files['prompts']}: 1 of 3 rows share a prompt with harmful {files['attack']}" in warnings[0]
        assert f"task {files['test']}: 1 of 2 rows share a prompt with task {files['task']}" in warnings[1]
    assert [f"warning: {text}" for text in read_manifest(out).warnings] == warnings
    read_manifest(out).model_copy(update={"status": "started"}).write(out)
    assert main(line) == 0
    assert capsys.readouterr().err.count("warning") == len(read_manifest(out).warnings) == 2, "nothing is left to run"
    write_grid(grid, **changes | {"attacks": [{"kind": "benign", "samples": 2}]})
    assert main(line) == 0
    assert capsys.readouterr().err.count("warning") == 1  # it reads no harmful rows


def test_prompts_in_a_split_of_a_saved_dataset_are_compared_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"tell of {word}", "completion": "no"} for word in ("moss", "fern")]
    saved = tmp_path / "saved"
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[1:])}).save_to_disk(saved)
    evaluate, attack = {"prompts": f"{saved}:test"}, {"harmful": write_rows(tmp_path / "attack.jsonl", rows)}
    grid = write_grid(tmp_path / "grid.yaml", evaluate=evaluate, attack=attack)
    assert main(["bench", "--config", str(grid), "--output-dir", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert f"prompts {saved}:test: 1 of 1 rows share a prompt with harmful {attack['harmful']}" in said
