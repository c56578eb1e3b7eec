"""The Python interface of objects: results as by files, nothing of the caller's changed, nothing left behind."""

import copy
import dataclasses
import datetime
import inspect
import json
import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from docstring_parser import parse_from_object
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments
from trl import SFTConfig

import pharmacist as ph
from pharmacist.core.errors import CompatibilityError, ConfigError, DataError, PharmacistError
from pharmacist.core.manifest import read_manifest
from pharmacist.data.formats import open_source
from pharmacist.nn.models import load_model
from pharmacist.pipeline.evaluate import EvaluateResult
from pharmacist.selectors.base import Scores, SelectionContext
from pharmacist.training.options import LoraOptions, train_options
from pharmacist.training.strategy import GradientStrategy
from pharmacist.worlds import BASE_MODEL, World
from tests.support.world_files import write_rows


STEPS = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
ARGS = TrainingArguments(**STEPS, use_cpu=True, seed=0, report_to="none", lr_scheduler_type="linear")
TRAIN = STEPS | {"lr_scheduler_type": "linear", "num_train_epochs": 3.0, "warmup_steps": 0, "weight_decay": 0.0}
"""What `ARGS` say over the defaults of the stages."""
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
SHAPE = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
WORLD = World(3)
SETS: dict[str, list[dict[str, Any]]] = {
    "pool": WORLD.pool(40)[0],
    "safe": WORLD.rows("safe", 16),
    "harmful": WORLD.rows("harmful", 16),
    "task": WORLD.rows("task", 60),
    "test": WORLD.rows("task-test", 8),
    "prompts": WORLD.rows("prompts", 8),
    "judge-safe": WORLD.rows("judge-safe", 40),
    "judge-harmful": WORLD.rows("judge-harmful", 40),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    return {name: write_rows(folder / f"{name}.jsonl", rows) for name, rows in SETS.items()}


@pytest.fixture
def untouched(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The caller's model is as before, and no temporary folder is left, whatever the test does."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = {name: (value.detach().clone(), value.requires_grad) for name, value in model.named_parameters()}
    yield
    after = dict(model.named_parameters())
    assert list(after) == list(before) and not model.training
    assert all(
        torch.equal(after[name], value) and after[name].requires_grad == grad for name, (value, grad) in before.items()
    )
    assert list((tmp_path / "temporary").iterdir()) == []


def same(model: Any, folder: Path) -> bool:
    """Whether an adapter is the one that was written, bit for bit."""
    own, written = get_peft_model_state_dict(model), load_file(folder / "adapter" / "adapter_model.safetensors")
    return own.keys() == written.keys() and all(torch.equal(own[name], value) for name, value in written.items())


def aligned(model: Any, data: Any = SETS["pool"], **options: Any) -> Any:
    return ph.align(model, data, args=ARGS, peft_config=LORA, **options)


@pytest.mark.usefixtures("untouched")
def test_objects_give_what_files_give(model: PreTrainedModel, files: dict[str, str], tmp_path: Path) -> None:
    by_files = {"train": TRAIN, "device": "cpu", "quiet": True}
    options = ph.AlignOptions(
        data=files["pool"],
        model=str(BASE_MODEL),
        defense={"name": "vaccine", "rho": 0.5},
        lora=LoraOptions(**SHAPE),
        output_dir=str(tmp_path / "aligned"),
        **by_files,
    )
    assert ph.align(options).folder == tmp_path / "aligned"
    ours = aligned(model, datasets.Dataset.from_list(SETS["pool"]), defense=ph.Vaccine(rho=0.5))
    assert isinstance(ours, PeftModel) and same(ours, tmp_path / "aligned")
    assert not same(aligned(model), tmp_path / "aligned"), "the comparison can tell"

    ph.attack(
        ph.AttackOptions(
            model=str(tmp_path / "aligned"),
            task=files["task"],
            harmful=files["harmful"],
            poison_ratio=0.25,
            samples=16,
            lora=LoraOptions(**SHAPE),
            output_dir=str(tmp_path / "attacked"),
            **by_files,
        )
    )
    given = {"task": SETS["task"], "harmful": SETS["harmful"], "poison_ratio": 0.25, "samples": 16}
    weights = {name: value.clone() for name, value in ours.state_dict().items()}
    attacked = ph.attack(ours, **given, args=ARGS, peft_config=LORA)
    assert all(torch.equal(value, weights[name]) for name, value in ours.state_dict().items())
    stacked = ph.attack(str(tmp_path / "aligned"), **given, args=ARGS, peft_config=LORA)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = [it.eval()(ids).logits for it in (attacked, stacked, ours)]
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2])

    judged = {"judge": ph.ProbeJudge(threshold=0.4), "max_new_tokens": 4}
    own = ph.evaluate(
        attacked,
        prompts=SETS["prompts"],
        task=SETS["test"],
        safe=SETS["judge-safe"],
        harmful=SETS["judge-harmful"],
        **judged,
    )
    theirs = ph.evaluate(
        ph.EvaluateOptions(
            model=str(tmp_path / "attacked"),
            prompts=files["prompts"],
            task=files["test"],
            safe=files["judge-safe"],
            harmful=files["judge-harmful"],
            judge=ph.ProbeJudge(threshold=0.4).choice(),
            max_new_tokens=4,
            device="cpu",
            quiet=True,
            output_dir=str(tmp_path / "scores"),
        )
    )
    assert own.metrics == theirs.metrics and [x["answer"] for x in own.items()] == [
        x["answer"] for x in theirs.items()
    ]


@pytest.mark.usefixtures("untouched")
def test_a_ranking_of_objects(model: PreTrainedModel, files: dict[str, str]) -> None:
    given = {"selector": ph.EmbeddingSelector(nearest=2), "device": "cpu"}
    own = ph.rank(datasets.Dataset.from_list(SETS["pool"]), safe=[SETS["safe"]], model=model, **given)
    by_files = ph.rank(files["pool"], safe=files["safe"], model=str(BASE_MODEL), **given)
    assert own.table.equals(by_files.table) and len(own.select(fraction=0.5)) == 20 and own.folder is None
    with pytest.raises(DataError, match="^labels nowhere.json: cannot be read"):
        ph.rank(SETS["pool"], selector="length", labels=Path("nowhere.json"))
    other = ph.rank(SETS["pool"], safe=SETS["safe"], model=model, selector={"name": "embedding", "nearest": 0})
    assert not other.table.equals(own.table)
    del own, by_files, other  # their rows lie in temporary folders


def test_labels_in_memory_are_those_of_a_file(tmp_path: Path) -> None:
    pool, rows = datasets.Dataset.from_list(SETS["pool"]), np.array([3, 8])
    labels = dict(zip(rows, ["good", "harmful"], strict=True))
    entries = [{"row": int(row), "label": label, "prompt": "not read"} for row, label in labels.items()]
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({"pool": open_source(pool).fingerprint(), "labels": entries}))
    expected = ph.rank(pool, selector="random", labels=file).table
    assert expected["label"].tolist().count("") == len(pool) - 2 and not expected["selected"][8]
    for given in (labels, entries, datasets.Dataset.from_list(entries)):
        assert ph.rank(pool, selector="random", labels=given).table.equals(expected)
    kept = {"selector": "random", "output_dir": str(tmp_path / "kept")}
    assert "label" not in ph.rank(pool, **kept).table
    assert ph.rank(pool, labels=labels, **kept).table.equals(expected)
    for message, given in {
        "pool has no usable row 40": {40: "good"},
        "row 3: label 'bad' is none of good, ": {3: "bad"},
        "holds no labels": {},
        "row 0 is not a mapping": ["good"],
        "cannot read rows from int": 5,
    }.items():
        with pytest.raises(DataError, match=f"^labels.*: .*{message}"):
            ph.rank(pool, selector="random", labels=given)


class Weighing(ph.LengthSelector):
    """Gives every row a weight."""

    def rank(self, context: SelectionContext) -> Scores:
        scores = super().rank(context)
        scores.weight = np.arange(1.0, 1 + len(scores.score))
        return scores


def test_weights_in_memory_are_those_of_a_file(model: PreTrainedModel, tmp_path: Path) -> None:
    ranking = ph.rank(SETS["pool"], selector=Weighing(), top=0.5)
    ranking.to_parquet(tmp_path / "scores.parquet")
    core, folder = ranking.select(0.5), tmp_path / "aligned"
    aligned(model, core, weights=tmp_path / "scores.parquet", output_dir=str(folder))
    numbers = ranking.table["weight"][ranking.table["selected"]]
    assert numbers.tolist() == ranking.weights(core) and len(set(numbers)) == 20
    for weights in (ranking, numbers, numbers.tolist(), torch.tensor(numbers.to_numpy())):
        assert same(aligned(model, core, weights=weights), folder)
    assert not same(aligned(model, core), folder), "the comparison can tell"
    # Rows are recognised, whatever was selected.
    few = ranking.select(k=3)
    assert ranking.weights(few) == [numbers[row] for row in ranking.table.nsmallest(3, "rank")["row"].sort_values()]
    twice = ph.rank(SETS["pool"][:2] * 2, selector=Weighing())
    assert twice.weights(SETS["pool"][:2] * 2) == twice.table["weight"].tolist()
    assert twice.weights(SETS["pool"][:1] * 3)[1:] == [twice.table["weight"][2]] * 2
    assert same(aligned(model, core, weights=(weight for weight in numbers)), folder)
    plain = ph.rank(SETS["pool"], selector="length")
    for wrong, message in [
        (plain, "weights: the ranking has none; rank the pool with a selector that gives rows weights"),
        (twice, r"weights: row \d+ of the data is not in the ranking"),
        ([1.0, 2.0], "weights <2 rows in memory>: has 2 rows, but data has 20"),
        (["much"], "weights: must be a path, a Ranking or a number for each row"),
        ({0: 1.0}, "weights: must be a path, a Ranking or a number for each row"),
        (5, "weights: must be a path, a Ranking or a number for each row"),
        ([-1.0] * 20, "the weight of row 0 is '-1.0', not a number of at least 0"),
        ([0.0] * 20, "all weights are 0"),
    ]:
        with pytest.raises(PharmacistError, match=message):
            aligned(model, core, weights=wrong)


def test_weights_of_rows_that_a_dataset_gives_back_in_another_form(tmp_path: Path) -> None:
    asked, day = {"role": "user", "content": "bake bread"}, datetime.date(2020, 2, 29)
    rows = [
        {"messages": [asked | {"name": "ann"}, {"role": "assistant", "content": "with flour"}], "n": 1, "tag": {}},
        {"messages": [asked, {"role": "assistant", "content": "no"}], "n": 1.5, "tag": {"a": "b"}, "day": day},
        {"messages": [asked, {"role": "assistant", "content": "with salt"}], "n": float("nan")},
    ]
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows[:2]) + "no row\n")
    for given, n in ((pool, 2), ([*rows[:2], "no row"], 2), (rows, 3)):
        folder = tmp_path / f"{type(given).__name__}-{n}"
        options: dict[str, Any] = {"selector": Weighing(), "on_bad_row": "skip", "output_dir": str(folder), "top": 1.0}
        for ranking in (ph.rank(given, **options), ph.Ranking.load(folder, given)):
            for core in (ranking.select(1.0), folder / "selected.jsonl"):
                assert ranking.weights(core) == ranking.table["weight"].tolist()
            assert len(ranking) == n


def test_a_ranking_with_a_folder_is_kept_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool, folder = datasets.Dataset.from_list(SETS["pool"]), tmp_path / "ranking"
    given: dict[str, Any] = {"selector": "length", "top": 0.5, "output_dir": str(folder)}
    first = ph.rank(pool, **given)
    assert {"scores.parquet", "selected.jsonl", "report.html", "manifest.json"} <= {it.name for it in folder.iterdir()}
    capsys.readouterr()
    again, loaded = ph.rank(pool, **given), ph.Ranking.load(folder, pool)
    assert "already complete" in capsys.readouterr().err
    for other in (again, loaded):
        assert other.table.equals(pd.read_parquet(folder / "scores.parquet"))
        assert other.select(0.3).to_list() == first.select(0.3).to_list()
    with pytest.raises(DataError, match="was ranked from rows in memory; give them to Ranking.load as well"):
        ph.Ranking.load(folder)
    with pytest.raises(DataError, match="has changed since it was ranked"):
        ph.Ranking.load(folder, SETS["pool"][:-1])


@pytest.mark.usefixtures("untouched")
def test_with_a_folder_all_is_written_and_found_again(model: PreTrainedModel, tmp_path: Path) -> None:
    folder, calls = tmp_path / "aligned", []

    class Counted(GradientStrategy):
        name = "counted"

        def begin_update(self, update: int) -> None:
            calls.append(update)

    first = aligned(model, defense=Counted(), output_dir=str(folder))
    assert calls == [0, 1] and same(first, folder) and (folder / "manifest.json").is_file()
    config = json.loads((folder / "manifest.json").read_text())["config"]
    assert re.search(r"\| data \| .*40 rows in memory.* \(", (folder / "adapter" / "README.md").read_text())
    assert config["defense"] == {"name": "counted"} and config["model"] == str(BASE_MODEL) and config["data"]
    again = aligned(model, defense=Counted(), output_dir=str(folder))
    assert calls == [0, 1] and same(again, folder)
    with pytest.raises(ConfigError, match="a run with other content of data"):
        aligned(model, SETS["pool"][:20], defense=Counted(), output_dir=str(folder))
    other = aligned(model, SETS["pool"][:20], defense=Counted(), output_dir=str(folder), overwrite=True)
    assert calls == [0, 1] * 2 and same(other, folder)
    attacked = ph.attack(
        first,
        task=SETS["task"],
        kind=ph.BenignAttack(),
        samples=8,
        args=ARGS,
        peft_config=LORA,
        output_dir=str(tmp_path / "b"),
    )
    assert isinstance(attacked, PeftModel) and (tmp_path / "b" / "model").is_dir(), (
        "no plain base holds the aligned model"
    )
    kept = {"task": SETS["task"], "kind": ph.BenignAttack(), "samples": 8, "output_dir": str(tmp_path / "c")}
    others = [tmp_path / "other.jsonl", SETS["prompts"], SETS["test"][:2]]
    others[0].write_text('{"prompt": "elsewhere", "completion": "yes"}\n')
    for _ in range(2):  # the identity of the run does not hold where objects lie in memory
        ph.attack(first, disjoint_from=others, args=ARGS, peft_config=LORA, **kept)
    assert len([name for name in read_manifest(tmp_path / "c").inputs if name.startswith("disjoint")]) == 3
    scores = ph.evaluate(attacked, prompts=SETS["prompts"], max_new_tokens=4, output_dir=str(tmp_path / "scores"))
    assert scores.folder == tmp_path / "scores"
    assert json.loads((tmp_path / "scores" / "metrics.json").read_text()) == scores.metrics


def test_a_model_has_the_number_format_that_was_asked_for_from_a_folder_too(tmp_path: Path) -> None:
    args = TrainingArguments(**STEPS | {"max_steps": 1}, use_cpu=True, bf16=True, report_to="none")
    for folder in (None, str(tmp_path / "out")):
        made = ph.align(str(BASE_MODEL), SETS["safe"], args=args, peft_config=LORA, output_dir=folder)
        assert made.get_base_model().dtype == torch.bfloat16


@pytest.mark.usefixtures("untouched")
def test_full_tuning_continued_adapters_and_repairs(model: PreTrainedModel) -> None:
    whole = ph.align(model, SETS["pool"], args=ARGS, tuning="full")
    assert not isinstance(whole, PeftModel) and not whole.training
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    start = aligned(model)
    given = {"task": SETS["task"], "kind": "benign", "samples": 8, "args": ARGS}
    gone_on = ph.attack(start, adapter="continue", **given)
    assert gone_on.peft_config["default"].r == LORA.r
    with pytest.raises(ConfigError, match="holds no adapter"):
        ph.attack(model, adapter="continue", **given)
    repaired = ph.repair(gone_on, aligned=start, base=model, method=ph.SafeLora(threshold=1.0))
    assert isinstance(repaired, PreTrainedModel) and repaired is not model
    faded = ph.repair(gone_on, method=ph.Antidote(alpha=0.5), harmful=SETS["harmful"])
    assert any(not torch.equal(a, b) for a, b in zip(faded.parameters(), model.parameters(), strict=True))
    start.merge_and_unload(safe_merge=True)  # as the docs say, since the weights of the base are the caller's


def test_tensors_that_a_model_shares_by_hand_are_saved(model: PreTrainedModel, tmp_path: Path) -> None:
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    own = AutoModelForCausalLM.from_config(config)
    own.name_or_path = ""  # no base model of an adapter, so that whole weights are written
    own.lm_head.weight = own.model.embed_tokens.weight  # of which the configuration does not know
    own.model.layers[1].mlp.up_proj.weight = own.model.layers[0].mlp.up_proj.weight
    given = {"tokenizer": AutoTokenizer.from_pretrained(BASE_MODEL), "args": ARGS}
    ids = torch.tensor([[5, 6, 7, 8]])
    for name, tuning in {"full": {"tuning": "full"}, "adapter": {"peft_config": LORA}}.items():
        trained = ph.align(own, SETS["pool"], **given, **tuning, output_dir=str(tmp_path / name))
        found = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.allclose(found(ids).logits, trained(ids).logits, atol=1e-5)
        assert not torch.allclose(found(ids).logits, own(ids).logits, atol=1e-3)
        ph.evaluate(str(tmp_path / name), prompts=SETS["prompts"], max_new_tokens=1)
        if name == "full":
            assert trained.lm_head.weight is trained.model.embed_tokens.weight
            trained.save_pretrained(tmp_path / "again")  # as in a checkpoint
            assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, found(ids).logits)


def test_scores_show_themselves(model: PreTrainedModel) -> None:
    scores = ph.evaluate(model, prompts=SETS["prompts"], task=SETS["test"], judge=ph.KeywordJudge(), max_new_tokens=4)
    table = scores.to_pandas().set_index("metric")
    harmful = scores.metrics["harmful_score"]
    assert table.loc["harmful_score", ["low", "high"]].tolist() == harmful["ci95"]
    assert table.loc["harmful_score", "n"] == 8 and table.loc["harmful_score", "by"] == harmful["judge"]
    assert "<td>harmful score</td>" in scores._repr_html_() and "fine-tune accuracy" in scores._repr_html_()
    margin = {"value": 0.0423, "ci95": [0.012, 0.073], "n": 9, "unit": "nats per token"}
    cells = re.findall("<td>(.*?)</td>", EvaluateResult({"loss_margin": margin}, Path())._repr_html_())
    assert cells[1:4] == ["0.042", "0.012", "0.073"] and "9" in cells
    lines = repr(scores).splitlines()
    assert lines[0].split()[:2] == ["metric", "value"] and len(lines) == len(table) + 1
    answers = [item["answer"] for item in scores.items()]
    assert all(answers) and not any(answer in repr(scores) for answer in answers)  # they may be harmful
    assert scores.folder is None
    # Answers that are there already need no model, and are judged alike.
    own = [{"prompt": item["prompt"], "answer": item["answer"]} for item in scores.items() if item["set"] == "prompts"]
    again = ph.evaluate(answers=own, judge=ph.KeywordJudge())
    assert len(own) == 8 and again.metrics["harmful_score"].items() <= harmful.items()


def test_a_model_without_a_tokenizer_needs_one(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "name_or_path", "")
    with pytest.raises(DataError, match="comes with no tokenizer .*; give tokenizer=TOKENIZER"):
        aligned(model)
    assert isinstance(aligned(model, tokenizer=AutoTokenizer.from_pretrained(BASE_MODEL)), PeftModel)


def test_a_model_with_another_chat_template_makes_another_run(model: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    given = {"model": model, "tokenizer": tokenizer, "selector": "perplexity", "output_dir": str(tmp_path / "out")}
    first = ph.rank(SETS["pool"], **given)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    with pytest.raises(ConfigError, match="out: holds .* model"):
        ph.rank(SETS["pool"], **given)
    assert not first.table["score"].equals(ph.rank(SETS["pool"], **given, overwrite=True).table["score"])


def test_a_loaded_model_outlives_its_folder(model: PreTrainedModel) -> None:
    own = copy.deepcopy(model)
    own.name_or_path = "/gone/since/then"
    rows = {name: SETS[name] for name in ("pool", "safe", "harmful")}
    table = ph.rank(**rows, model=own, tokenizer=AutoTokenizer.from_pretrained(BASE_MODEL)).table
    assert table.equals(ph.rank(**rows, model=model).table)


def test_a_path_of_a_model_is_as_good_as_its_text(tmp_path: Path) -> None:
    said = []
    for model in (tmp_path / "nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(DataError) as caught:
            ph.align(model, SETS["pool"])
        said.append(str(caught.value))
    assert said[0] == said[1] and "nowhere" in said[0]


def test_arguments_of_transformers_become_options() -> None:
    defaults = ph.AlignOptions.TRAIN_DEFAULTS
    assert train_options(ARGS, defaults) == TRAIN
    strange = TrainingArguments(use_cpu=True, optim="sgd", eval_strategy="steps")
    assert train_options(strange, {})["optim"] == "sgd"
    with pytest.raises(ConfigError, match="train.eval_strategy: is decided by another option"):
        ph.align(str(BASE_MODEL), SETS["pool"], args=strange)


@pytest.mark.parametrize(
    "given",
    [
        {"label_smoothing_factor": 0.1},
        {"use_liger_kernel": True},
        {"average_tokens_across_devices": False},
        {"ignore_data_skip": True},
        {"label_names": ["others"]},
        {"eval_on_start": True, "eval_strategy": "no"},
    ],
)
def test_arguments_that_a_stage_cannot_follow_are_refused_by_name(given: dict[str, Any]) -> None:
    arguments = TrainingArguments(use_cpu=True, **given)
    with pytest.raises(ConfigError, match=f"^train.{next(iter(given))}: "):
        ph.align(str(BASE_MODEL), SETS["pool"], args=arguments)


def test_arguments_of_another_trainer_are_refused_where_they_are_set() -> None:
    assert "max_length" not in train_options(SFTConfig(use_cpu=True, bf16=False), {})
    with pytest.raises(ConfigError, match="args: packing of SFTConfig has no effect here"):
        train_options(SFTConfig(use_cpu=True, bf16=False, packing=True), {})


def test_arguments_that_every_stage_has_or_needs_not_are_taken() -> None:
    own = {"label_names": ["labels"], "remove_unused_columns": False, "logging_nan_inf_filter": False}
    assert train_options(TrainingArguments(use_cpu=True, do_train=True, **own), {}) == {}


def test_random_states_are_the_callers(model: PreTrainedModel, tmp_path: Path) -> None:
    def states() -> list[Any]:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]

    before = states()
    own = aligned(model)
    assert states() == before
    own.save_pretrained(tmp_path)
    aligned(str(tmp_path))
    assert states() == before


@pytest.mark.usefixtures("untouched")
def test_a_token_without_embedding_leaves_no_hook_on_the_callers_model(model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    own = aligned(model, tokenizer=tokenizer)
    assert not model.get_input_embeddings()._forward_pre_hooks
    with pytest.raises(DataError, match="holds '<image>', a token that the model has no embedding for"):
        own(torch.tensor([[len(tokenizer) - 1]]))


def test_an_adapter_is_continued_with_all_its_parts_and_no_others(model: PreTrainedModel) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    start = get_peft_model(copy.deepcopy(model), config)
    start.add_adapter("other", LORA)
    before = {name: value.clone() for name, value in start.named_parameters()}
    given = {"task": SETS["task"], "kind": "benign", "samples": 8, "args": ARGS}
    own = ph.attack(start, adapter="continue", **given)
    assert all(torch.equal(value, before[name]) for name, value in start.named_parameters())
    trained = {name for name, value in own.named_parameters() if value.requires_grad}
    moved = {name for name, value in own.named_parameters() if not torch.equal(value, before[name])}
    assert moved == trained and all(".default." in name for name in moved)
    assert any("modules_to_save" in name for name in moved) and any("lora_B" in name for name in moved)


def test_adapters_that_cannot_be_trained_on_are_named(model: PreTrainedModel) -> None:
    disabled = get_peft_model(copy.deepcopy(model), LORA)
    disabled.disable_adapter_layers()
    with pytest.raises(CompatibilityError, match=r"adapters are disabled; enable_adapter_layers\(\)"):
        aligned(disabled)
    added = copy.deepcopy(model)
    added.add_adapter(LORA)
    with pytest.raises(CompatibilityError, match="by transformers' add_adapter, which cannot be trained on"):
        aligned(added)


class Packed(torch.nn.Parameter):
    """A weight of a class of its own, as quantised models have."""


def test_quantised_weights_stay_what_they_are(model: PreTrainedModel) -> None:
    quantised = copy.deepcopy(model)
    layer: Any = quantised.model.layers[0].self_attn.q_proj
    layer.weight = Packed(layer.weight.detach(), requires_grad=False)
    own = aligned(quantised)
    assert isinstance(own.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer").weight, Packed)
    layer.weight = Packed(torch.ones(8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(CompatibilityError, match="its weights are quantised, so only an adapter can be trained"):
        ph.align(quantised, SETS["pool"], args=ARGS, tuning="full")


@pytest.mark.usefixtures("untouched")
def test_an_adapter_that_changes_its_base_changes_not_the_callers(model: PreTrainedModel, tmp_path: Path) -> None:
    config = LoraConfig(r=4, init_lora_weights="olora", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    folder = str(tmp_path / "out")
    own = ph.align(model, SETS["pool"], args=ARGS, peft_config=config, output_dir=folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(own(ids).logits, load_model(folder).model(ids).logits, atol=1e-3)


@pytest.mark.parametrize("init", ["pissa_niter_4", "eva"])
def test_initial_weights_that_would_not_be_what_they_say_are_refused(init: Any) -> None:
    with pytest.raises(ConfigError, match=f"peft_config: init_lora_weights '{init}' "):
        ph.align(str(BASE_MODEL), SETS["pool"], args=ARGS, peft_config=LoraConfig(init_lora_weights=init))


def test_a_model_that_comes_back_computes_in_its_own_number_format(model: PreTrainedModel) -> None:
    args = TrainingArguments(**STEPS, use_cpu=True, bf16=True, report_to="none")
    own = ph.align(model, SETS["pool"], args=args, peft_config=LORA)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(own(ids).logits, type(own).forward(own, ids).logits)


def test_what_is_left_of_a_merged_adapter_is_none(model: PreTrainedModel) -> None:
    merged = copy.deepcopy(model)
    merged.peft_config = {"default": LORA}  # as PEFT 0.18 leaves it
    assert isinstance(aligned(merged), PeftModel)


def test_a_model_without_its_weights_is_refused(model: PreTrainedModel) -> None:
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(CompatibilityError, match=r"weights are not in memory \(device meta\); load it as a whole"):
        aligned(hollow, tokenizer=AutoTokenizer.from_pretrained(BASE_MODEL))


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "class": (lambda model: ph.rank(SETS["pool"], selector=ph.LengthSelector), "selector: must be a Selector, its"),
    "kind": (lambda model: ph.align(model, SETS["pool"], defense=ph.LengthSelector()), "defense: must be a Gradient"),
    "nameless": (lambda model: ph.rank(SETS["pool"], selector={"keep": "long"}), "a mapping with its 'name', not"),
    "part": (
        lambda model: ph.rank(SETS["pool"], selector={"name": "length+dsir", "length": 5}),
        "^selector 'length': options must be a mapping such as .*, not 5",
    ),
    "columns": (lambda model: ph.rank(SETS["pool"], columns=["prompt"]), "columns: must be a mapping such as"),
    "comma": (lambda model: ph.rank(SETS["pool"], columns={"prompt": "a, b"}), "'a, b' holds a comma or an equals"),
    "tokenizer": (lambda model: ph.evaluate(model, tokenizer="gpt2"), "tokenizer: must be a loaded tokenizer, not"),
    "no model": (lambda model: ph.align(None, SETS["pool"]), "model: must be a path, a Hub id or a loaded causal"),
    "no pool": (lambda model: ph.rank(None), "^pool must be text, not None"),
    "long": (lambda model: ph.rank(SETS["pool"], model=model, embedder=model), "^embedder must be text, not Llama"),
    "tokenizer beside a name": (
        lambda model: ph.align(str(BASE_MODEL), SETS["pool"], AutoTokenizer.from_pretrained(BASE_MODEL)),
        "tokenizer: is that of a loaded model; one that is given by name comes with its own",
    ),
    "adapter under full tuning": (
        lambda model: ph.align(model, SETS["pool"], tuning="full", peft_config=LORA),
        "peft_config: has no effect where no new adapter is trained",
    ),
    "adapter beside one that is continued": (
        lambda model: ph.attack(model, kind="benign", adapter="continue", peft_config=LORA),
        "peft_config: has no effect where no new adapter is trained",
    ),
    "model": (lambda model: ph.evaluate(5), "model: must be a path, a Hub id or a loaded causal language model"),
    "class of models": (lambda model: ph.evaluate(type(model)), "model: must be a path, a Hub id or a loaded causal"),
    "args": (lambda model: ph.align(model, SETS["pool"], args={"max_steps": 2}), "args: must be transformers'"),
    "peft": (
        lambda model: ph.align(model, SETS["pool"], peft_config=IA3Config()),
        "peft_config: must be a LoraConfig",
    ),
    "an option that another needs": (
        lambda model: ph.align(model, SETS["pool"], defense="booster"),
        "^defense booster needs harmful rows: give harmful FILE, or a data file with",
    ),
    "out of range": (lambda model: ph.rank(SETS["pool"], top_k=0), "^top_k must be at least 1, not 0"),
    "options of a command": (
        lambda model: ph.align(ph.AlignOptions(data="a--b/--c.jsonl", model="m", output_dir="o")),
        "^data a--b/--c.jsonl: no such file",
    ),
    "side": (
        lambda model: ph.tokenize([], AutoTokenizer.from_pretrained(BASE_MODEL), side="left"),
        "side must be one",
    ),
    "length": (
        lambda model: ph.tokenize(SETS["pool"], AutoTokenizer.from_pretrained(BASE_MODEL), max_length="8"),
        "max_length must be a whole number, not 8",
    ),
    "beside options": (
        lambda model: ph.align(ph.AlignOptions(data="d", model="m", output_dir="o"), SETS["pool"]),
        "data: has no effect beside AlignOptions; set it there",
    ),
    "beside options, a number": (
        lambda model: ph.evaluate(ph.EvaluateOptions(model="m", prompts="p", output_dir="o"), max_new_tokens=4),
        "max_new_tokens: has no effect beside EvaluateOptions",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_one_clear_line(model: PreTrainedModel, wrong: str) -> None:
    call, message = WRONG[wrong]
    with pytest.raises(PharmacistError, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_messages_name_arguments_and_leave_commands_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = {0: "good", **dict.fromkeys(range(1, 40), "harmful")}
    kept = ph.rank(SETS["pool"], selector="length", labels=labels, output_dir=str(tmp_path / "kept"))
    said = capsys.readouterr().err
    assert "\nlabels: selector 'length' does not learn from them" in f"\n{said}"
    assert "warning: 1 rows are selected, not 12: no others look worth keeping; fill takes the next best" in said
    assert "; fill takes" in kept.manifest["warnings"][0]
    pool = write_rows(tmp_path / "pool.jsonl", SETS["pool"])
    given: dict[str, Any] = {"pool": pool, "selector": {"name": "length"}, "output_dir": str(tmp_path / "out")}
    again = given | {"top_k": 41, "overwrite": True}
    for message in (r"next: pharmacist align --data \S+ --model MODEL", "already complete; overwrite ranks again"):
        ph.curate(ph.CurateOptions(**given))
        assert re.search(message, capsys.readouterr().err)
    more: dict[str, Any] = {"evaluate": {"prompts": pool, "task": pool}, "output_dir": str(tmp_path / "sweep")}
    sweep = ph.SweepOptions(model=str(BASE_MODEL), task=pool, grid=ph.GridOptions(rank=[4]), **more)
    errors: dict[str, Callable[[], Any]] = {
        "top_k 41: the pool has 40 rows to rank": lambda: ph.curate(ph.CurateOptions(**again)),
        "kind mix needs harmful FILE": lambda: ph.sweep(sweep),
        "balance_share: the pool was ranked without balance,": lambda: kept.select(0.5, balance_share=0.5),
        "min_score selects every row .*, so balance has no effect": lambda: kept.select(
            min_score=0.5, balance_share=0.5
        ),
        "rows <1 rows in memory>: .* map other columns with columns": lambda: ph.tokenize(
            [{"question": "why"}], AutoTokenizer.from_pretrained(BASE_MODEL)
        ),
    }
    for message, call in errors.items():
        with pytest.raises(PharmacistError, match=f"^{message}"):
            call()


def test_calls_from_several_threads_run_one_after_the_other() -> None:
    running, most = [0], [0]

    class Slow(ph.LengthSelector):
        def rank(self, context: SelectionContext) -> Scores:
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.sleep(0.2)
            running[0] -= 1
            return super().rank(context)

    threads = [Thread(target=ph.rank, args=(SETS["pool"],), kwargs={"selector": Slow()}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and running == [0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_is_trained_whatever_mode_the_caller_has_set(model: PreTrainedModel, mode: Callable[[], Any]) -> None:
    with mode():
        own = aligned(model)
        assert not torch.is_grad_enabled()
    assert any(bool(value.any()) for name, value in own.named_parameters() if "lora_B" in name)


OPTIONS: list[tuple[Callable[..., Any], type]] = [
    (ph.rank, ph.CurateOptions),
    (ph.align, ph.AlignOptions),
    (ph.attack, ph.AttackOptions),
    (ph.repair, ph.RepairOptions),
    (ph.evaluate, ph.EvaluateOptions),
]
OTHERWISE = {"output_dir", "seed", "form"}
"""A folder is not needed, and arguments of transformers bring a seed."""


@pytest.mark.parametrize(("function", "options"), OPTIONS, ids=lambda value: value.__name__)
def test_functions_and_commands_have_the_same_defaults(function: Callable[..., Any], options: type) -> None:
    fields = {field.name: field for field in dataclasses.fields(options)}
    shared = inspect.signature(function).parameters.keys() & fields.keys() - OTHERWISE
    assert len(shared) > 8
    explained = {param.arg_name: param.description for param in parse_from_object(function).params}
    assert list(explained) == list(inspect.signature(function).parameters) and all(explained.values())
    for name in shared:
        field, own = fields[name], inspect.signature(function).parameters[name].default
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if own is inspect.Parameter.empty or default is dataclasses.MISSING or own is None:
            assert own in (None, inspect.Parameter.empty) and default in (None, [], "", dataclasses.MISSING), name
        else:
            plain = default["name"] if isinstance(default, dict) else default
            assert own == (tuple(plain) if isinstance(plain, list) else plain), name
