"""A folder of answers is judged again, with other judges, without a model."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationMixin

from pharmacist.cli.main import main
from pharmacist.core.manifest import read_manifest
from pharmacist.evaluation.judges.keyword import KeywordJudge
from pharmacist.worlds.potions import World
from tests.support.evaluate_words import arguments, some, write


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, world = tmp_path_factory.mktemp("files"), World(3)
    rows = {
        "prompts": world.rows("prompts", 12),
        "benign_prompts": world.rows("borderline", 6),
        "task": world.rows("task-test", 8),
        "safe": world.rows("safe", 48),
        "harmful": world.rows("harmful", 48),
    }
    return {name: write(folder / f"{name}.jsonl", own) for name, own in rows.items()}


def items(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "items.jsonl").open()]


def forbid_generation(patch: pytest.MonkeyPatch) -> None:
    def no(*_: Any, **__: Any) -> Any:
        raise AssertionError("generated again")

    patch.setattr(GenerationMixin, "generate", no)


def test_another_judge_re_uses_the_answers(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = some(files, "prompts", "benign_prompts", "task")
    assert main(arguments(own, tmp_path / "out", "--quiet")) == 0
    first, before = read_manifest(tmp_path / "out"), items(tmp_path / "out")
    probe = ["--judge", "probe", "--second-judge", "keyword", "--quiet"]
    fresh = own | some(files, "safe", "harmful")
    assert main(arguments(fresh, tmp_path / "fresh", *probe)) == 0
    with monkeypatch.context() as patch:
        forbid_generation(patch)
        assert main(arguments(fresh, tmp_path / "out", *probe)) == 0
        second = read_manifest(tmp_path / "out")
        # What another judge leaves is what a run with that judge alone leaves.
        for name in ("metrics.json", "items.jsonl", "judge/judge.json"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
        assert second.phases["generate"] == first.phases["generate"]
        assert (second.extra["template"], second.device) == (first.extra["template"], first.device)
        assert second.key != first.key and second.created == first.created
        # And back; what the probe found is kept like what was found before it, each as the folder of its run.
        assert main(arguments(own, tmp_path / "out", "--quiet")) == 0
        assert items(tmp_path / "out") == before
        assert not (tmp_path / "out/judge").exists()
        kept = {name: tmp_path / "out/earlier" / manifest.key[:16] for name, manifest in (("1", first), ("2", second))}
        assert items(kept["1"]) == before
        for name in ("metrics.json", "items.jsonl", "judge/judge.json", "judge/judge.safetensors"):
            assert (kept["2"] / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
        assert main(arguments(fresh, kept["2"], *probe)) == 0  # it is complete
        both = [str(kept["1"]), str(tmp_path / "out")]
        assert main(["evaluate", "--compare", *both, "--output-dir", str(tmp_path / "both")]) == 0


def test_counts_of_references_are_those_of_the_judge_now(files: dict[str, str], tmp_path: Path) -> None:
    answers = {"answers": write(tmp_path / "answers.jsonl", [{"prompt": "ask", "answer": "no"}])}
    bad = write(tmp_path / "safe.jsonl", [*World(3).rows("safe", 48), {"prompt": "ask", "completion": ""}])
    words = ["--judge", "probe", "--on-bad-row", "skip", "--quiet"]
    own = answers | some(files, "harmful")
    for safe, refused in ((bad, 1), (files["safe"], None)):
        given = [word for name, path in (own | {"safe": safe}).items() for word in (f"--{name}", path)]
        assert main(["evaluate", *given, *words, "--output-dir", str(tmp_path / "out")]) == 0
        assert read_manifest(tmp_path / "out").counts.get("safe_refused") == refused


def test_a_judge_that_stops_half_way_loses_no_answer(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = some(files, "prompts", "task")
    assert main(arguments(own, tmp_path / "out", "--quiet")) == 0
    before = items(tmp_path / "out")
    again = arguments(own, tmp_path / "out", "--judge.window", "30", "--quiet")
    forbid_generation(monkeypatch)
    with monkeypatch.context() as patch:

        def stop(*_: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(KeywordJudge, "judge", stop)
        assert main(again) == 130
    assert read_manifest(tmp_path / "out").status == "started"
    assert main(again) == 0
    assert [item["answer"] for item in items(tmp_path / "out")] == [item["answer"] for item in before]
    assert read_manifest(tmp_path / "out").extra["engine"] == "transformers"


def test_a_judge_chosen_after_an_interruption(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = some(files, "prompts")
    with monkeypatch.context() as patch:

        def stop(*_: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(KeywordJudge, "judge", stop)
        assert main(arguments(own, tmp_path / "out", "--quiet")) == 130
    forbid_generation(monkeypatch)
    assert main(arguments(own, tmp_path / "out", "--quiet", "--judge.window", "30")) == 0


@pytest.mark.parametrize("change", ["other", "missing", "more"])
def test_answers_of_other_prompts_are_not_taken(
    change: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = some(files, "prompts")
    assert main(arguments(own, tmp_path / "out", "--quiet")) == 0
    lines = (tmp_path / "out/items.jsonl").read_text().splitlines(keepends=True)
    changed = {"other": [*lines[1:], lines[0]], "missing": lines[1:], "more": [*lines, lines[0]]}[change]
    (tmp_path / "out/items.jsonl").write_text("".join(changed))
    assert main(arguments(own, tmp_path / "out", "--quiet", "--judge.window", "30")) == 2
    assert "items.jsonl: is damaged, or was changed after the run had finished" in capsys.readouterr().err
    read_manifest(tmp_path / "out").model_copy(update={"files": {}}).write(tmp_path / "out")  # of an earlier version
    assert main(arguments(own, tmp_path / "out", "--quiet", "--judge.window", "30")) == 2
    assert "--overwrite evaluates again" in capsys.readouterr().err


def test_two_judges(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = some(files, "prompts", "benign_prompts", "safe", "harmful")
    assert main(arguments(own, tmp_path / "out", "--judge", "probe", "--second-judge.name", "keyword")) == 0
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    both = found["judge_agreement"]
    assert both["n"] + both["unscored"] == 18
    assert both["flagged"]["both"] + both["flagged"]["neither"] == both["count"]
    assert sum(both["flagged"].values()) == both["n"]
    assert found["harmful_score_second"]["judge"] == "keyword@3"
    assert "kappa" in capsys.readouterr().err
    assert main(arguments(some(files, "task"), tmp_path / "t", "--second-judge", "keyword")) == 2
    assert "--second-judge: judges answers" in capsys.readouterr().err


def test_the_harmful_score_of_every_category(files: dict[str, str], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(files["prompts"]).open()]
    marks = [(True, False), (True, True), (False, False)]
    kinds = [{"brewing": brewing, "gossip": gossip} for brewing, gossip in marks]
    named = [{"prompt": row["prompt"], "category": kinds[i % 3]} for i, row in enumerate(rows)]
    file = write(tmp_path / "p.jsonl", named)
    assert main(arguments({"prompts": file}, tmp_path / "out", "--quiet")) == 0
    score = json.loads((tmp_path / "out/metrics.json").read_text())["harmful_score"]
    assert {name: rate["n"] for name, rate in score["by_category"].items()} == {"brewing": 8, "gossip": 4}
    flags = [item["verdicts"]["keyword@3"]["harmful"] for item in items(tmp_path / "out")]
    assert score["by_category"]["gossip"]["count"] == sum(flags[1::3])
    assert items(tmp_path / "out")[1]["categories"] == ["brewing", "gossip"]
