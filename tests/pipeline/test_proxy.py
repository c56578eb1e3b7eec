"""A small model ranks for another one: no method needs the two to share a tokenizer."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pharmacist.cli.main import main
from pharmacist.core.manifest import read_manifest
from pharmacist.worlds import BASE_MODEL
from tests.support.tiny import save_tiny_model
from tests.support.world_files import CHEAP, curate_words, write_world


def test_a_proxy_with_another_tokenizer_ranks_what_a_model_is_aligned_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, proxy = write_world(tmp_path / "files", rows=20), str(save_tiny_model(tmp_path / "proxy"))
    text = json.loads(Path(files["pool"]).read_text().splitlines()[0])["completion"]
    one, other = (AutoTokenizer.from_pretrained(model)(text)["input_ids"] for model in (proxy, BASE_MODEL))
    assert one != other, "the tokenizers differ"
    core = tmp_path / "core"
    assert main(curate_words(files, core, *CHEAP, "--top-k", "8", "--quiet", model=proxy)) == 0
    selected = core / "selected.jsonl"
    aligned = ["--output-dir", str(tmp_path / "aligned"), "--train.max_steps", "2", "--lora.r", "2", "--quiet"]
    words = ["align", "--data", str(selected), "--model", str(BASE_MODEL), "--device", "cpu", *aligned]
    assert main([*words, "--train.per_device_train_batch_size", "2"]) == 0
    assert read_manifest(tmp_path / "aligned").counts["trained"] == 8 == len(selected.read_text().splitlines())
    # Negative control: what the proxy has learned is bound to the proxy.
    capsys.readouterr()
    pool = {"pool": files["pool"]}
    assert main(curate_words(pool, tmp_path / "more", "--resume-selector", str(core), "--quiet")) == 2
    said = capsys.readouterr().err
    assert "was trained on another model than" in said and said.count("\n") == 1
    assert not list((tmp_path / "more").glob("*"))
