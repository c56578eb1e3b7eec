"""What stages will take before anything like them was measured: tokens of the real files over this machine's speed.

A model in a local folder is timed for some seconds; what was timed is kept in the user's cache. Data is read as the
stages read it, and a sample of it tokenised.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pharmacist.core.errors import PharmacistError
from pharmacist.core.files import read_json, write_json
from pharmacist.core.hashing import sha256_json


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pharmacist.nn.models import LoadedModel
    from pharmacist.pipeline.bench.grid import Plan
    from pharmacist.pipeline.bench.stages import Stage

    Lengths = npt.NDArray[np.int64]

STEPS = {
    "sft": 1.0,
    "vaccine": 1.8,
    "t-vaccine": 1.7,
    "repnoise": 2.4,
    "booster": 2.8,
    "tar": 2.6,
    "lisa": 1.0,
    "ewc": 1.0,
    "kl": 1.3,
    "ldifs": 1.3,
    "vlguard": 2.0,
    "constrained-sft": 1.3,
}
"""Defense -> time of a training step over that of plain fine-tuning (`benchmarks/defense_cost.py`)."""
READS = {"loss-low": 1.0, "loss-high": 1.0, "perplexity": 1.0, "embedding": 1.0, "ifd": 2.0, "pharmacist": 1.0}
"""Selector -> how often its model reads the pool."""
REFERENCES = 2.5
"""How often `pharmacist` reads its references: they are corrupted too."""
WITHOUT_MODEL = ("full", "random", "length", "dsir", "classifier")
JUDGES = ("keyword", "probe")
"""Judges that take no time to speak of."""
_SAMPLE = 256
"""Rows of a file that are tokenised."""
_MOST = 4 * 2**30
"""Bytes of weights up to which a model is loaded for an estimate."""
_WORK = {"cpu": 1e11, "cuda": 1e15}
"""Parameters times tokens of a step that is timed."""
_OVERHEAD = 1.0
"""Seconds that a stage takes beside all that is counted."""


@dataclass(frozen=True)
class Rates:
    """Seconds that a model takes here.

    Attributes:
        reading: For a token of a forward pass.
        training: For a token of a step of plain fine-tuning, padding counted.
        step: For a new token of one prompt.
        prompt: Further, for that of each other prompt of the batch.
    """

    reading: float
    training: float
    step: float
    prompt: float


class Expectation:
    """Estimates for the stages of a graph.

    Args:
        plan: The graph.
    """

    def __init__(self, plan: "Plan") -> None:
        self._plan = plan
        self._loaded = cache(self._load)
        self._lengths = cache(self._read)

    def of(self, stage: "Stage") -> tuple[float, int | None] | None:
        """Seconds of a stage and tokens that it trains on; None where that cannot be told without running it."""
        kinds: Mapping[str, Callable[[Stage], tuple[float, int | None] | None]] = {
            "rank": self._rank,
            "select": lambda stage: (_OVERHEAD, None),
            "align": self._align,
            "attack": self._attack,
            "evaluate": self._evaluate,
        }
        try:
            found = kinds[stage.kind](stage) if stage.kind in kinds else None
        except PharmacistError:  # such as rows that are on a hub that cannot be reached
            return None
        return found

    def _rank(self, stage: "Stage") -> tuple[float, int | None] | None:
        options, name = stage.options, stage.options.selector["name"]
        if name in WITHOUT_MODEL:
            return _OVERHEAD, None
        loaded = self._model(options, options.model)
        if name not in READS or options.selector.get("form", "evidence") != "evidence" or loaded is None:
            return None
        n, lengths = self._rows(options, loaded, "pool", options.pool)
        tokens = READS[name] * n * lengths.mean()
        for reference in ("safe", "harmful", "utility") if name == "pharmacist" else ():
            for spec in getattr(options, reference) or ():
                n, lengths = self._rows(options, loaded, reference, spec)
                tokens += REFERENCES * n * lengths.mean()
        return _OVERHEAD + tokens * self._rates(loaded, options, lengths).reading, None

    def _align(self, stage: "Stage") -> tuple[float, int | None] | None:
        select = self._plan.stages[stage.parents[0]]
        rank = self._plan.stages[select.parents[0]]
        loaded = self._model(stage.options, stage.options.model)
        if loaded is None:
            return None
        n, lengths = self._rows(stage.options, loaded, "data", rank.options.pool)
        return self._training(stage, loaded, round(select.options.top * n), lengths)

    def _attack(self, stage: "Stage") -> tuple[float, int | None] | None:
        import numpy as np

        from pharmacist.attacks import ATTACKS

        options, loaded = stage.options, self._trained(stage)
        if loaded is None:
            return None
        needs = ATTACKS.build_from(options.kind).needs
        parts = {name: self._rows(options, loaded, name, getattr(options, name))[1] for name in sorted(needs)}
        shares = {"harmful": options.poison_ratio, "task": 1 - options.poison_ratio}
        if not parts:
            return None
        whole = len(parts) == 1
        mixed = [np.resize(part, 1000 if whole else round(1000 * shares[name])) for name, part in parts.items()]
        return self._training(stage, loaded, options.samples, np.concatenate(mixed))

    def _training(
        self, stage: "Stage", loaded: "LoadedModel", n: int, lengths: "Lengths"
    ) -> tuple[float, int | None] | None:
        import numpy as np

        options, name = stage.options, stage.options.defense["name"]
        if name not in STEPS:
            return None
        train = options.effective_train
        batch = int(train["per_device_train_batch_size"])
        steps = int(train.get("max_steps", 0)) * int(train.get("gradient_accumulation_steps", 1))
        rows = steps * batch if steps > 0 else n * float(train["num_train_epochs"])
        order = np.random.default_rng(0).permutation(np.resize(lengths, batch * 100)).reshape(-1, batch)
        padded = rows * float(order.max(1).mean())
        rates = self._rates(loaded, options, lengths)
        return _OVERHEAD + padded * rates.training * STEPS[name], round(rows * float(lengths.mean()))

    def _evaluate(self, stage: "Stage") -> tuple[float, int | None] | None:
        import numpy as np

        from pharmacist.evaluation.generate import context_length, plan_batches

        options, loaded = stage.options, self._trained(stage)
        if stage.like is not None:  # the answers of another judge's evaluation
            return _OVERHEAD, None
        own = options.engine["name"] == "transformers" and options.judge["name"] in JUDGES
        if loaded is None or not own or options.perplexity is not None or options.lm_eval is not None:
            return None
        seconds = _OVERHEAD
        for name in ("prompts", "benign_prompts", "task"):
            if (spec := getattr(options, name)) is None:
                continue
            n, lengths = self._rows(options, loaded, name, spec)
            rates = self._rates(loaded, options, lengths)
            batches = plan_batches(
                np.resize(lengths, n).tolist(),
                options.max_new_tokens,
                context_length(loaded.model),
                options.batch_size,
            )
            steps = sum(one.new_tokens * (rates.step + rates.prompt * (len(one.rows) - 1)) for one in batches)
            seconds += n * float(lengths.mean()) * rates.reading + steps
        return seconds, None

    def _trained(self, stage: "Stage") -> "LoadedModel | None":
        """The base of what a stage reads: an adapter makes it no slower."""
        while stage.kind != "align":
            stage = self._plan.stages[stage.parents[0]]
        return self._model(stage.options, stage.options.model)

    def _model(self, options: Any, name: str) -> "LoadedModel | None":
        return self._loaded(name, options.device, options.dtype, options.template, options.trust_remote_code)

    @staticmethod
    def _load(name: str, device: str, dtype: str, template: str, trust_remote_code: bool) -> "LoadedModel | None":
        from pharmacist.nn.models import base_of, load_model

        place: str | None = name
        while place is not None:
            folder = Path(place)
            if not folder.is_dir() or sum(path.stat().st_size for path in folder.rglob("*.safetensors")) > _MOST:
                return None
            place = base_of(place)
        return load_model(name, device=device, dtype=dtype, template=template, trust_remote_code=trust_remote_code)

    def _rows(self, options: Any, loaded: "LoadedModel", name: str, spec: str) -> tuple[int, "Lengths"]:
        """How many rows a file has, and the tokens of some of them."""
        longest = min(getattr(options, "max_length", 0) or loaded.max_length, loaded.max_length)
        own = (options.device, options.dtype, options.template, options.trust_remote_code)
        return self._lengths(loaded.name, *own, name, spec, longest)

    def _read(self, *key: Any) -> tuple[int, "Lengths"]:
        import numpy as np

        from pharmacist.data.formats import open_source
        from pharmacist.data.records import read_records
        from pharmacist.data.tasks import open_task
        from pharmacist.data.tokenize import encode
        from pharmacist.evaluation.generate import encode_prompts
        from pharmacist.evaluation.prompts import open_prompts

        loaded, (name, spec, longest) = self._loaded(*key[:-3]), key[-3:]
        assert loaded is not None
        asked = name in ("prompts", "benign_prompts")
        opener: Callable[..., Any] = open_prompts if asked else open_task if name == "task" else open_source
        with tempfile.TemporaryDirectory() as folder:
            text = self._plan.data.text(spec)
            if text is not None:
                spec = str(Path(folder, "rows.jsonl"))
                Path(spec).write_text(text, encoding="utf-8")
            records = read_records(
                opener(spec, name=name),
                work_dir=Path(folder, "rows"),
                side="rejected" if name == "harmful" else "chosen",
                on_bad_row="skip",
                prompts_only=asked,
            )
            n = len(records)
            sample = np.random.default_rng(0).permutation(n)[:_SAMPLE]
            rows = records.dataset.select(sorted(sample.tolist()))
            if asked:
                return n, np.array([len(ids) for ids in encode_prompts(rows, loaded.tokenizer, loaded.template)])
            found = encode(rows, loaded.tokenizer, loaded.template, max_length=longest, on_long_prompt="cut")
            return n, found.lengths.astype(np.int64)

    def _rates(self, loaded: "LoadedModel", options: Any, lengths: "Lengths") -> Rates:
        import torch

        from pharmacist.nn.models import model_fingerprint

        train = getattr(options, "effective_train", {})
        length = max(2, round(float(lengths.mean()) / 16) * 16)
        rows = int(train.get("per_device_train_batch_size", 8))
        shape = {"rows": rows, "length": length, "tuning": getattr(options, "tuning", None)}
        lora = asdict(options.lora) if hasattr(options, "lora") else None
        machine = [str(loaded.device), torch.get_num_threads(), torch.__version__, str(torch.cpu.current_device())]
        key = sha256_json([model_fingerprint(loaded.name), loaded.facts["dtype"], machine, shape, lora])
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pharmacist", "rates", f"{key}.json")
        if not path.is_file():
            rates = measure(loaded, options if train else None, rows, length)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(rates))
        return Rates(**read_json(path))


def measure(loaded: "LoadedModel", training: Any, rows: int, length: int) -> Rates:
    """Times a model on random tokens: a forward pass, a training step, some new tokens.

    Args:
        loaded: The model.
        training: Options of the stage that trains; None where none does.
        rows: Of a batch; fewer are timed where the model is large.
        length: Tokens of each.
    """
    import torch

    from pharmacist.nn.models import silent_library
    from pharmacist.training.loop import prepare_model
    from pharmacist.training.trainer import token_mean_loss

    model, device = loaded.model, loaded.device
    generator = torch.Generator().manual_seed(0)
    rows = max(1, min(rows, int(_WORK[device.type] / model.num_parameters() / length)))

    def tokens(rows: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, int(model.config.vocab_size), (rows, length), generator=generator).to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def answer(rows: int, new: int) -> None:
        model.generate(**tokens(rows, 8), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    batch = tokens(rows, length)
    with torch.inference_mode(), silent_library():
        reading = _fastest(lambda: model(**batch), device) / batch["input_ids"].numel()
        decoding = [
            (_fastest(partial(answer, n, 9), device) - _fastest(partial(answer, n, 1), device)) / 8 for n in (1, 17)
        ]
    if training is None:
        return Rates(reading, 0.0, decoding[0], max(0.0, decoding[1] - decoding[0]) / 16)
    trained: Any = prepare_model(loaded, training).train()
    optimizer = torch.optim.AdamW([weight for weight in trained.parameters() if weight.requires_grad])

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=loaded.dtype == torch.bfloat16):
            loss = token_mean_loss(trained(**batch), batch["input_ids"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with silent_library():
        seconds = _fastest(step, device) / batch["input_ids"].numel()
    if training.tuning == "lora":
        loaded.model = trained.unload()
    loaded.model.eval()
    return Rates(reading, seconds, decoding[0], max(0.0, decoding[1] - decoding[0]) / 16)


def _fastest(work: Callable[[], Any], device: Any) -> float:
    """Seconds of the faster of two runs, the first of which also warms up."""
    import torch

    found = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)
