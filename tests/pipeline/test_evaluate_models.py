"""Several models in one command, side by side."""

import json
from pathlib import Path

import pytest

from pharmacist.cli.main import main
from pharmacist.core.config import parse
from pharmacist.core.manifest import check_unchanged, read_manifest
from pharmacist.pipeline.evaluate import EvaluateOptions
from pharmacist.worlds.potions import BASE_MODEL, World
from tests.support.evaluate_words import write
from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, world = tmp_path_factory.mktemp("files"), World(3)
    rows = {"prompts": world.rows("prompts", 8), "task": world.rows("task-test", 8)}
    return [word for name, own in rows.items() for word in (f"--{name}", write(folder / f"{name}.jsonl", own))]


def test_each_is_evaluated_as_alone_and_shown_beside_the_others(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(BASE_MODEL), str(save_tiny_model(tmp_path / "tiny"))]
    common = [*files, "--device", "cpu", "--max-new-tokens", "12", "--output-dir"]
    words = ["evaluate", "--models", *models, *common, str(tmp_path / "out")]
    assert main(words) == 0
    told = " ".join(capsys.readouterr().err.split())
    names = [f"1-{BASE_MODEL.name}", "2-tiny"]
    assert all(name in told for name in (*names, "harmful score", "fine-tune accuracy"))
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(found) == names
    for name, model in zip(names, models, strict=True):
        assert main(["evaluate", "--model", model, *common, str(tmp_path / name), "--quiet"]) == 0
        for file in ("metrics.json", "items.jsonl"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "out" / name / file).read_bytes()
        assert found[name] == json.loads((tmp_path / name / "metrics.json").read_text())
        metric = found[name]["harmful_score"]
        assert f"{metric['count']} / {metric['n']}" in told
        assert "[{:.0f}, {:.0f}]".format(*metric["ci95"]) in told
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.stage, manifest.status) == ("evaluate-models", "success")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    assert main(words) == 0  # nothing is done again
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    pair = [str(tmp_path / "out" / name) for name in names]
    assert main(["evaluate", "--compare", *pair, "--output-dir", str(tmp_path / "ab"), "--quiet"]) == 0
    assert main([*words, "--overwrite", "--quiet"]) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == found


def test_loss_margins_are_shown_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "may i?", "chosen": f"no {word}.", "rejected": f"yes {word}."} for word in ("never", "not")]
    margin, models = write(tmp_path / "margin.jsonl", rows), [str(BASE_MODEL), str(save_tiny_model(tmp_path / "tiny"))]
    out = ["--device", "cpu", "--output-dir", str(tmp_path / "out")]
    assert main(["evaluate", "--models", *models, "--margin", margin, *out]) == 0
    told, found = capsys.readouterr().err, json.loads((tmp_path / "out/metrics.json").read_text())
    assert "nats per token" in told and len(found) == 2
    assert all(f"{own['loss_margin']['value']:.3f}" in told for own in found.values())


def test_another_judge_and_a_further_model_reuse_the_answers(files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["evaluate", *files[:2], "--device", "cpu", "--quiet", "--max-new-tokens", "4", "--output-dir", str(out)]
    words += ["--models", str(BASE_MODEL)]
    assert main(words) == 0
    first = out / f"1-{BASE_MODEL.name}"
    answers = [json.loads(line)["answer"] for line in (first / "items.jsonl").open()]
    for name in ("safe", "harmful"):
        write(tmp_path / f"{name}.jsonl", World(4).rows(name, 12))
    probe = ["--judge", "probe", "--safe", str(tmp_path / "safe.jsonl"), "--harmful", str(tmp_path / "harmful.jsonl")]
    assert main([*words, str(save_tiny_model(tmp_path / "tiny")), *probe]) == 0
    found = json.loads((out / "metrics.json").read_text())
    assert [found[name]["harmful_score"]["judge"][:5] for name in found] == ["probe", "probe"]
    assert [json.loads(line)["answer"] for line in (first / "items.jsonl").open()] == answers


def test_other_references_of_the_judge_make_a_whole_result(files: list[str], tmp_path: Path) -> None:
    harmful, out = tmp_path / "harmful.jsonl", tmp_path / "out"
    write(harmful, World(4).rows("harmful", 12))
    words = ["evaluate", "--models", str(BASE_MODEL), str(BASE_MODEL), *files[:2], "--device", "cpu", "--quiet"]
    words += ["--max-new-tokens", "4", "--judge", "probe", "--harmful", str(harmful), "--output-dir", str(out)]
    words += ["--safe", write(tmp_path / "safe.jsonl", World(4).rows("safe", 12))]
    assert main(words) == 0
    before = read_manifest(out)
    write(harmful, World(5).rows("harmful", 14))
    assert main(words) == 0
    found, manifest = json.loads((out / "metrics.json").read_text()), read_manifest(out)
    assert found != before.metrics, "else this proves nothing"
    assert manifest.metrics == found and manifest.status == "success" and not (out / "work").exists()
    check_unchanged(out, *manifest.outputs)


def test_models_in_another_order_keep_their_folders(files: list[str], tmp_path: Path) -> None:
    tiny, out = str(save_tiny_model(tmp_path / "tiny")), tmp_path / "out"
    words = ["evaluate", *files[:2], "--device", "cpu", "--quiet", "--max-new-tokens", "4", "--output-dir", str(out)]
    assert main([*words, "--models", str(BASE_MODEL), tiny]) == 0
    folders = [f"1-{BASE_MODEL.name}", "2-tiny"]
    before = {path: path.read_bytes() for name in folders for path in (out / name).iterdir() if path.is_file()}
    for models, shown in ([tiny, str(BASE_MODEL)], folders[::-1]), ([tiny], folders[1:]):
        assert main([*words, "--models", *models]) == 0
        assert list(json.loads((out / "metrics.json").read_text())) == shown
        assert before == {path: path.read_bytes() for path in before}, "nothing is asked again"
        assert sorted(read_manifest(out).outputs) == [*folders, "metrics.json"]
    assert main([*words, "--models", tiny, "--overwrite"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["1-tiny", "manifest.json", "metrics.json"]


def test_a_missing_model_is_named_before_any_is_asked(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "--models", str(BASE_MODEL), str(tmp_path / "missing"), *files]
    assert main([*words, "--output-dir", str(tmp_path / "out"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "missing" in error and error.count("\n") == 1
    assert not list((tmp_path / "out").rglob("answers*"))
    assert main([*words, "--model", "x", "--output-dir", str(tmp_path / "out")]) == 2
    assert "--models: takes the place of --model" in capsys.readouterr().err


def test_no_models_leave_the_one_model(files: list[str], tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(f"model: {BASE_MODEL}\nmodels: []\nmax_new_tokens: 2\ndevice: cpu\n")
    words = ["evaluate", "--config", str(file), *files[:2], "--quiet", "--output-dir", str(tmp_path / "out")]
    assert main(words) == 0
    assert "harmful_score" in json.loads((tmp_path / "out/metrics.json").read_text())


def test_the_same_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("models: [a, b c]\nprompts: p.jsonl\nengine: openai\nbase-url: http://there/v1\n")
    found = parse(EvaluateOptions, ["--config", str(file), "--output-dir", "out"])
    assert found.models == ["a", "b c"]
    assert (found.engine["name"], found.engine["base_url"]) == ("openai", "http://there/v1")
    line = ["--models", "a", "b c", "--prompts", "p.jsonl", "--engine", "openai", "--base-url", "http://there/v1"]
    assert parse(EvaluateOptions, [*line, "--output-dir", "out"]) == found
