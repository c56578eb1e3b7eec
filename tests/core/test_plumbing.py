"""Registry, seeds, fingerprints, manifest, environment, tables."""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from pharmacist.core import registry as registry_module
from pharmacist.core.env import offline, versions
from pharmacist.core.errors import ConfigError, DataError, UnknownNameError
from pharmacist.core.hashing import sha256_content, sha256_file, sha256_folder, sha256_json, sha256_text
from pharmacist.core.manifest import SCHEMA_VERSION, Phase, RunManifest, read_manifest
from pharmacist.core.progress import print_table
from pharmacist.core.registry import Registry, closest
from pharmacist.core.seeding import derive


@dataclass
class SpoonConfig:
    length: int = 3


class Spoon:
    Config = SpoonConfig

    def __init__(self, config: SpoonConfig) -> None:
        self.config = config


def tools(**more: str) -> Registry[Spoon]:
    return Registry("tool", {"spoon": f"{__name__}:Spoon", "fork": "no.such.module:Fork"} | more, group="tests.tools")


def test_names_are_looked_up_without_importing() -> None:
    assert tools().names() == ["fork", "spoon"]
    assert tools().get("spoon") is Spoon
    with pytest.raises(ModuleNotFoundError):
        tools().get("fork")


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"^unknown tool 'spon'; did you mean 'spoon'\?$"):
        tools().get("spon")
    with pytest.raises(UnknownNameError, match="^unknown tool 'xyz'; known: fork, spoon$"):
        tools().get("xyz")
    assert closest("a", []) == "; known: none"


def test_names_that_end_in_the_words_are_offered_first() -> None:
    long = "a-very-long-name-of-a-batch-size"
    known = ["batch-size-x", "a.batch_size", "b.batch_size", "harmful-batch-size", "train.batch_size", long]
    found = closest("--batch-size", known)
    assert found == "; did you mean 'b.batch_size' or 'a.batch_size' or 'harmful-batch-size' or 'train.batch_size'?"
    assert closest("batch-sise", known) == "; did you mean 'batch-size-x'?", "one that is only spelled alike"


def test_methods_are_built_from_their_options() -> None:
    assert tools().build("spoon", {"length": 5}).config == SpoonConfig(5)
    assert tools().build_from({"name": "spoon"}).config == SpoonConfig(3)
    with pytest.raises(ConfigError, match=r"tool 'spoon' has no option 'lenght'; did you mean 'length'\?"):
        tools().build_from({"name": "spoon", "lenght": 5})


def test_other_packages_add_methods_but_replace_none(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("ladle", f"{__name__}:Spoon", "tests.plugins"),
        EntryPoint("spoon", "other:Spoon", "tests.plugins"),
    ]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points if group == "tests.plugins" else [])
    known = Registry("tool", tools().table(), group="tests.plugins")
    assert known.names() == ["fork", "ladle", "spoon"]
    assert known.get("ladle") is Spoon
    assert known.get("spoon") is Spoon


def test_a_package_that_fails_while_it_is_imported_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_ladle.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("ladle", "broken_ladle:Ladle", "g"), EntryPoint("spoon", f"{__name__}:Spoon [extra]", "g")]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points)
    known = Registry("tool", {}, group="tests.broken")
    with pytest.raises(ConfigError, match=r"tool 'ladle': its entry point broken_ladle:Ladle cannot be .*no licence"):
        known.get("ladle")
    assert known.get("spoon") is Spoon, "extras are no part of the name"


def test_streams_are_stable_and_apart() -> None:
    assert derive(0, "readers", "folds") == 6429608829961109110  # of old: other seeds would change published results
    names = [(), ("a",), ("b",), ("a", "b"), ("ab",), ("a", 0), ("a", 1), ("b", "a")]
    seeds = {derive(seed, *name) for seed in (0, 1, 2) for name in names}
    assert len(seeds) == 3 * len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_fingerprints(tmp_path: Path) -> None:
    assert sha256_text("ü") == hashlib.sha256("ü".encode()).hexdigest()
    assert sha256_text("\ud800") != sha256_text("?")
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1}) != sha256_json({"a": 1, "b": 3})
    (tmp_path / "a.json").write_text("1")
    (tmp_path / "b.bin").write_text("2")
    assert sha256_file(tmp_path / "a.json") == hashlib.sha256(b"1").hexdigest()

    def of_json() -> str:
        return sha256_folder(tmp_path, lambda name: name.suffix == ".json")

    all_files, only_json = sha256_folder(tmp_path), of_json()
    (tmp_path / "b.bin").write_text("3")
    assert of_json() == only_json
    assert sha256_folder(tmp_path) != all_files
    (tmp_path / "a.json").rename(tmp_path / "c.json")  # names count too
    assert of_json() != only_json


def manifest() -> RunManifest:
    return RunManifest(stage="curate", status="success", key="k", config={"seed": 0}, inputs={"pool": "abc"})


def test_manifest_round_trip(tmp_path: Path) -> None:
    written = manifest()
    written.phases["read"] = Phase(seconds=1.5, tokens=7)
    written.write(tmp_path)
    assert read_manifest(tmp_path) == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "not a manifest that this version reads"),
        ("[]", "not a manifest that this version reads"),
        ({"status": "maybe"}, "not a manifest that this version reads"),
        ({"unknown": 1}, "not a manifest that this version reads"),
        ({"schema_version": SCHEMA_VERSION + 1}, "newer version"),
        ({"schema_version": SCHEMA_VERSION + 1, "unknown": 1}, "newer version"),
        ({"schema_version": "one"}, "not a manifest that this version reads"),
        (None, "no manifest.json"),
    ],
)
def test_a_manifest_that_is_none(change: object, message: str, tmp_path: Path) -> None:
    if isinstance(change, dict):
        change = json.dumps(manifest().model_dump(mode="json") | change)
    if change is not None:
        (tmp_path / "manifest.json").write_text(str(change))
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_versions_name_what_changes_results() -> None:
    assert {"python", "pharmacist", "torch", "transformers", "peft", "datasets"} <= set(versions())


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("ON", True), ("0", False), ("", False)])
def test_offline(value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert offline() is expected


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, pharmacist, pharmacist.cli.main; print('torch' in sys.modules, 'datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "modeling.py", "1_Pooling/config.json", "data-0-of-1.arrow", "state.json", "vocab.txt"],
)
def test_the_content_of_a_folder_is_all_that_is_loaded_from_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    found = []
    for content in ("a", "b"):
        (tmp_path / name).write_text(content)
        found.append(sha256_content(tmp_path))
    for cache in ("cache-0123.arrow", "tmpx.arrow", ".lock", "README.md"):
        (tmp_path / cache).write_text("c")
    assert found[0] != found[1] == sha256_content(tmp_path)


@pytest.mark.parametrize("wrap", [True, False])
def test_a_table_that_is_too_wide_loses_no_column_and_cuts_no_number(
    wrap: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [["core", *(f"{column}.50 [{column}.25, {column}.75]" for column in range(1000, 1012))]]
    print_table("a title", ["arm", *(f"metric {column}" for column in range(12))], rows, wrap=wrap)
    said = capsys.readouterr().err
    assert all(word in said for cell in rows[0] for word in ([cell] if not wrap else cell.split()))
