"""The bilevel twins: how differently a safe and a toxic model learn to find each row (min over w of V_safe - V_toxic).

Two adapters share their start, every pool and utility batch and every seed; one also learns the safe references, the
other the harmful ones. The contrast of a row is its loss under the toxic twin less its loss under the safe twin.
Without harmful references the second twin learns nothing of its own, and the contrast is SEAL's.
"""

import io
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score

from pharmacist.core.errors import ConfigError
from pharmacist.core.files import read_json, write_json
from pharmacist.core.seeding import derive
from pharmacist.nn.adapters import AdapterBank
from pharmacist.nn.batching import Batch, IntArray, Sequences, batch_stream, make_batch
from pharmacist.selectors.base import CRITICAL
from pharmacist.selectors.jobs import Job, run_jobs
from pharmacist.selectors.options import PharmacistConfig
from pharmacist.selectors.pharmacist.references import CLASSES, GIVEN, References


FloatArray = npt.NDArray[np.float64]
Measure = Callable[[Sequences, Path, IntArray, str], dict[str, FloatArray]]

TWINS = ("twin_safe", "twin_toxic")
WITHOUT_HARMFUL = ("twin_safe", "twin_auxiliary")
"""The twins where there are no harmful references: the second is SEAL's auxiliary model, which learns what both learn
(weighted pool and utility) and nothing of its own."""
FEWEST_COTRAINED = 256


@dataclass(frozen=True)
class TwinProblem:
    """Data and weights of the twins' losses.

    Attributes:
        references: All references in tokens.
        rows: ``safe``, ``harmful``, ``utility`` (the last two maybe empty) -> rows of `references`.
        pool: The pool in tokens.
        pool_rows: Rows of the pool that the twins train on; empty for the cheap form.
        gamma: Weight of the pool against the references, in [0, 1).
        mu: Weight of the utility references against safe or harmful ones.
        steps: Updates.
        seed: Of the batches.
    """

    references: Sequences
    rows: Mapping[str, IntArray]
    pool: Sequences
    pool_rows: IntArray
    gamma: float
    mu: float
    steps: int
    seed: int

    @property
    def twins(self) -> tuple[str, str]:
        """Names of the two adapters."""
        return TWINS if len(self.rows["harmful"]) else WITHOUT_HARMFUL


def cotraining_rows(content_keys: npt.NDArray[np.uint64], share: float, seed: int) -> IntArray:
    """A share of the pool (at least `FEWEST_COTRAINED` rows), drawn by content so that row order cannot matter."""
    if share <= 0:
        return np.zeros(0, dtype=np.int64)
    size = min(len(content_keys), max(FEWEST_COTRAINED, round(share * len(content_keys))))
    salt = np.uint64(derive(seed, "twins", "share"))
    with np.errstate(over="ignore"):  # a multiplicative hash; wrapping round is its point
        mixed = (content_keys ^ salt) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.lexsort((content_keys, mixed))[:size].astype(np.int64)


def sigma_closed_form(difference: FloatArray, tau: float) -> FloatArray:
    """Minimiser of mean_i sigma_i d_i + tau * KL(sigma || uniform) over weights with mean 1.

    Args:
        difference: d_i = loss under the safe twin - loss under the toxic twin, shape [rows].
        tau: Temperature; as it grows the weights become uniform.
    """
    logits = -difference / tau
    weights = np.exp(logits - logits.max())
    sigma: FloatArray = weights / weights.mean()
    return sigma


def weight_gradient(sigma: FloatArray, difference: FloatArray, gamma: float) -> FloatArray:
    """dG/dw_i = (gamma / N) sigma_i (d_i - mean_j sigma_j d_j), the envelope-theorem gradient of V_safe - V_toxic."""
    gradient: FloatArray = gamma / len(sigma) * sigma * (difference - (sigma * difference).mean())
    return gradient


def batch_weight_gradient(weights: FloatArray, difference: FloatArray, gamma: float) -> FloatArray:
    """`weight_gradient` from a batch that stands for the pool, in units of 1 / pool rows; other rows have none.

    The mean is taken over the batch under its own weights: rows with equal differences stay where they are, and so do
    rows that are not visited. At uniform weights its mean over all batches is the gradient, but for a factor.

    Args:
        weights: Weight (pool mean 1) of each row of the batch, shape [rows].
        difference: d_i of each, shape [rows].
        gamma: As in `weight_gradient`.
    """
    gradient: FloatArray = weight_gradient(weights / weights.mean(), difference, gamma) * weights.sum()
    return gradient


def mean_over_copies(keys: npt.NDArray[np.uint64], rows: IntArray, values: FloatArray) -> FloatArray:
    """What equal rows have in common: the mean of their values, in pool order.

    Args:
        keys: Content of every row, shape [pool rows].
        rows: Row of each value; every row once.
        values: Shape [pool rows].
    """
    _, inverse = np.unique(keys, return_inverse=True)
    totals, counts = np.zeros(inverse.max() + 1), np.zeros(inverse.max() + 1)
    np.add.at(totals, inverse[rows], values)
    np.add.at(counts, inverse[rows], 1)
    mean: FloatArray = (totals / counts)[inverse]
    return mean


class _TwinLoss:
    """(1 - gamma) [ L_own + mu L_U ] + gamma mean_i sigma_i l_i, as a function of the step; no own rows, no L_own."""

    def __init__(self, bank: AdapterBank, problem: TwinProblem) -> None:
        self.bank, self.problem = bank, problem
        size, steps, seed = bank.options.batch_size, problem.steps, problem.seed

        def stream(n: int, name: str) -> IntArray:
            return batch_stream(n, size, steps, derive(seed, "twins", name)) if n else np.zeros((steps, 0), np.int64)

        # One stream for both twins' own references: swapping S and H must swap the twins and nothing else.
        self.own = {name: stream(len(problem.rows[name]), "own") for name in ("safe", "harmful")}
        self.utility = stream(len(problem.rows["utility"]), "utility")
        self.pool = stream(len(problem.pool_rows), "pool")

    def completion_losses(self, adapter: str, sequences: Sequences, rows: IntArray) -> torch.Tensor:
        return self.bank.row_losses(adapter, make_batch(sequences, rows, self.bank.device)).completion

    def __call__(self, adapter: str, step: int, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The twin's loss and the unweighted losses of the step's pool rows."""
        problem, own = self.problem, "safe" if adapter == TWINS[0] else "harmful"
        loss = torch.zeros(())
        if len(problem.rows[own]):
            own_rows = problem.rows[own][self.own[own][step]]
            loss = loss + self.completion_losses(adapter, problem.references, own_rows).mean()
        if len(problem.rows["utility"]):
            utility = problem.rows["utility"][self.utility[step]]
            loss = loss + problem.mu * self.completion_losses(adapter, problem.references, utility).mean()
        if not len(problem.pool_rows) or problem.gamma == 0:
            return loss, loss.new_zeros(0)
        pool_losses = self.completion_losses(adapter, problem.pool, problem.pool_rows[self.pool[step]])
        weighted = (sigma[self.pool[step]].to(pool_losses) * pool_losses).mean()
        return (1 - problem.gamma) * loss + problem.gamma * weighted, pool_losses.detach()


def closed_form_jobs(bank: AdapterBank, problem: TwinProblem, sigma: FloatArray, folder: Path) -> list[Job]:
    """Training of both twins at fixed pool weights; two jobs, since nothing couples them.

    Args:
        bank: Receives the adapters `problem.twins`.
        problem: The data.
        sigma: Weight with mean 1 of each co-trained row, shape [len(problem.pool_rows)].
        folder: For the trained adapters.
    """
    loss, weights = _TwinLoss(bank, problem), torch.from_numpy(sigma)

    def job(name: str) -> Job:
        def run(checkpoint: Path, advance: Callable[[], object]) -> None:
            bank.add(name)
            bank.train(
                (name,),
                lambda step: loss(name, step, weights)[0],
                steps=problem.steps,
                checkpoint=checkpoint,
                advance=advance,
            )

        return Job((name,), folder, problem.steps, run)

    return [job(name) for name in problem.twins]


def gradient_job(bank: AdapterBank, problem: TwinProblem, rate: float, folder: Path) -> Job:
    """Both twins together with the logits w, which follow -dG/dw on each visited batch; needs every row co-trained.

    The logits of visited rows move by ``rate`` times their own gradient (no dense Adam: rows that were not visited
    must not drift). They are saved beside the adapters as ``logits.npy``.
    """
    loss, names = _TwinLoss(bank, problem), problem.twins
    logits = torch.zeros(len(problem.pool_rows), dtype=torch.float64)

    def step_loss(step: int) -> torch.Tensor:
        sigma = torch.softmax(logits, 0) * len(logits)
        safe, safe_losses = loss(names[0], step, sigma)
        other, other_losses = loss(names[1], step, sigma)
        rows = loss.pool[step]
        difference = (safe_losses - other_losses).double().cpu().numpy()
        gradient = batch_weight_gradient(sigma[rows].numpy(), difference, problem.gamma)
        logits.index_add_(0, torch.from_numpy(rows), torch.from_numpy(-rate * gradient))
        return safe + other

    def restore(tensors: dict[str, torch.Tensor]) -> None:
        logits.copy_(tensors["logits"])

    def run(checkpoint: Path, advance: Callable[[], object]) -> None:
        for name in names:
            bank.add(name)
        bank.train(
            names,
            step_loss,
            steps=problem.steps,
            checkpoint=checkpoint,
            advance=advance,
            extra=lambda: {"logits": logits.clone()},
            restore=restore,
        )
        save_logits(folder, logits.numpy())

    return Job(names, folder, problem.steps, run)


def save_logits(folder: Path, logits: FloatArray) -> None:
    """Writes logits of pool rows as ``logits.npy``."""
    from pharmacist.core.files import atomic_write

    with atomic_write(folder / "logits.npy") as file:
        # Through memory: numpy's own writing to files drops what a full disk does not take without a word.
        buffer = io.BytesIO()
        np.save(buffer, logits, allow_pickle=False)
        file.write(buffer.getbuffer())


def twin_losses(bank: AdapterBank, batch: Batch, names: tuple[str, ...] = TWINS) -> dict[str, FloatArray]:
    """Completion losses of a batch by twin: ``loss_safe``, ``loss_toxic`` or ``loss_auxiliary``; shape [rows]."""
    return {loss_name(name): bank.row_losses(name, batch).completion.double().cpu().numpy() for name in names}


def loss_name(twin: str) -> str:
    """What the losses under a twin are called."""
    return f"loss_{twin.removeprefix('twin_')}"


def safe_and_other(losses: Mapping[str, FloatArray]) -> tuple[FloatArray, FloatArray]:
    """The losses under the safe twin and under the other one, whichever it is."""
    names = TWINS if loss_name(TWINS[1]) in losses else WITHOUT_HARMFUL
    return losses[loss_name(names[0])], losses[loss_name(names[1])]


@dataclass(frozen=True)
class Thresholds:
    """Where the bilevel reasons change, from the twins' losses on the references.

    Attributes:
        critical: Contrast above which a row is safety-critical: half-way between utility and safe references.
        compliance: Contrast below which it teaches compliance: half-way between utility and harmful references; None
            without harmful references, and nothing is said to teach it.
        hard: Loss above which (under both twins) it is noise: the references' 99th percentile.
    """

    critical: float
    compliance: float | None
    hard: float


def fit_thresholds(losses: Mapping[str, FloatArray], rows: Mapping[str, IntArray]) -> Thresholds:
    """Thresholds from the losses under both twins of references that they were not trained on.

    Args:
        losses: Of all references, as `twin_losses` gives them.
        rows: Class -> held-out rows; where there are no utility references, their contrast is taken as 0.
    """
    safe, other = safe_and_other(losses)
    contrast = other - safe
    centre = {name: float(np.median(contrast[where])) if len(where) else 0.0 for name, where in rows.items()}
    known = np.concatenate([where for where in rows.values()])
    easier = np.minimum(safe, other)[known]
    return Thresholds(
        critical=(centre["safe"] + centre["utility"]) / 2,
        compliance=(centre["harmful"] + centre["utility"]) / 2 if len(rows["harmful"]) else None,
        hard=float(np.quantile(easier, 0.99)),
    )


def twin_reasons(losses: Mapping[str, FloatArray], thresholds: Thresholds) -> npt.NDArray[np.str_]:
    """Reasons from the two losses alone; over-refusals cannot be told from refusals this way."""
    safe, other = safe_and_other(losses)
    contrast, noise = other - safe, np.minimum(safe, other) > thresholds.hard
    compliance = -np.inf if thresholds.compliance is None else thresholds.compliance
    reasons: npt.NDArray[np.str_] = np.select(
        [noise, contrast < compliance, contrast < thresholds.critical],
        ["low_quality", "teaches_compliance", "not_safety_critical"],
        CRITICAL,
    )
    return reasons


def fall_back(config: PharmacistConfig, given: Collection[str]) -> str | None:
    """What the twins are instead without harmful references; None where they have them, or there are no twins.

    Raises:
        ConfigError: The options leave nothing to learn from what is given.
    """
    if config.form != "bilevel" and not {"harmful", "utility"} & set(given):
        raise ConfigError(
            "safe references alone have no other answers to be told from; give --harmful or --utility, or use "
            "--selector.form bilevel"
        )
    if config.form == "evidence" or "harmful" in given:
        return None
    if config.gamma == 0 or config.cotrain == 0:
        option = "gamma" if config.gamma == 0 else "cotrain"
        raise ConfigError(
            f"without harmful references the second twin learns from the pool alone, so selector.{option} must be "
            "above 0; or give --harmful, or use --selector.form evidence"
        )
    return (
        "without harmful references the twins fall back to SEAL's contrast: the model that also learns the safe "
        "references against an auxiliary one that learns the pool without them"
    )


class Twins:
    """The twins of one ranking: trained on references and a share of the pool, then asked for every row's contrast.

    A fold of the references (a source, where they have several) takes no part in the training. On it lie the
    thresholds of the reasons, and the quality that says whether the contrast is worth listening to.

    Args:
        bank: Holds the adapters.
        config: Options of the selector.
        names: `TWINS` or `WITHOUT_HARMFUL`.
    """

    def __init__(self, bank: AdapterBank, config: PharmacistConfig, names: tuple[str, ...]) -> None:
        self.bank, self.config, self.names = bank, config, names
        self.thresholds: Thresholds | None = None
        self.quality: float | None = None
        """AUC of held-out safe references against held-out others by the contrast; None where there are no others."""
        self.report: dict[str, Any] = {}

    def fit(
        self, references: Sequences, known: References, pool: Sequences, root: Path, seed: int, measure: Measure
    ) -> None:
        """Trains the twins.

        Args:
            references: In tokens.
            known: Their classes and folds.
            pool: In tokens.
            root: Folder for partial state.
            seed: Of the batches.
            measure: (rows of tokens, folder, rows, description) -> losses of all twins, NaN on other rows.
        """
        config = self.config
        given = {name: np.flatnonzero((known.labels == CLASSES.index(name)) & ~known.made) for name in GIVEN}
        held = {name: rows[known.folds[rows] == 0] for name, rows in given.items()}
        rows = {name: rows[known.folds[rows] != 0] for name, rows in given.items()}
        pool_rows = cotraining_rows(pool.content_keys, config.cotrain, seed)
        problem = TwinProblem(
            references=references,
            rows=rows,
            pool=pool,
            pool_rows=pool_rows,
            gamma=config.gamma,
            mu=config.mu,
            steps=config.twin_steps,
            seed=seed,
        )
        if config.solver == "gradient":
            folder = root / "gradient"
            run_jobs(self.bank, [gradient_job(self.bank, problem, config.weight_rate, folder)], "twins")
        else:
            sigma = np.ones(len(pool_rows))
            for number in range(config.rounds):
                folder = root / f"round{number}"
                run_jobs(self.bank, closed_form_jobs(self.bank, problem, sigma, folder), f"twins, round {number + 1}")
                if number + 1 < config.rounds and len(pool_rows):
                    self.load(folder)
                    losses = measure(pool, folder / "losses", pool_rows, "twins, co-trained rows")
                    safe, other = safe_and_other(losses)
                    sigma = sigma_closed_form((safe - other)[pool_rows], config.tau)
        self.load(folder)
        every = np.concatenate(list(held.values()))
        losses = measure(references, folder / "reference-losses", every, "twins, held-out references")
        self.thresholds = fit_thresholds(losses, held)
        safe, other = safe_and_other(losses)
        others = np.concatenate([held["harmful"], held["utility"]])
        if len(others) and len(held["safe"]):
            truth = np.repeat([1, 0], [len(held["safe"]), len(others)])
            self.quality = float(roc_auc_score(truth, (other - safe)[np.concatenate([held["safe"], others])]))
        self.report = {
            "solver": config.solver,
            "cotrained_rows": len(pool_rows),
            "thresholds": asdict(self.thresholds),
            "held_out_references": {name: len(rows) for name, rows in held.items()},
            "held_out_auc": self.quality,
        }

    def load(self, folder: Path) -> None:
        """Takes the adapters from a folder."""
        for name in self.names:
            self.bank.load(name, folder / name)

    def save(self, folder: Path) -> None:
        """Writes the adapters and ``twins.json``."""
        for name in self.names:
            self.bank.save(name, folder / name)
        thresholds = None if self.thresholds is None else asdict(self.thresholds)
        content = {"names": self.names, "thresholds": thresholds, "quality": self.quality, "report": self.report}
        write_json(folder / "twins.json", content)

    @classmethod
    def saved(cls, bank: AdapterBank, config: PharmacistConfig, folder: Path) -> "Twins":
        """Reads what `save` wrote."""
        content = read_json(folder / "twins.json")
        twins = cls(bank, config, tuple(content["names"]))
        twins.thresholds = Thresholds(**content["thresholds"])
        twins.quality, twins.report = content["quality"], content["report"]
        twins.load(folder)
        return twins

    def ordered(self, contrast: FloatArray, keys: npt.NDArray[np.uint64], root: Path, seed: int) -> FloatArray:
        """What the bilevel form ranks by: the contrast, or the gradient solver's logits."""
        if self.config.solver != "gradient":
            return contrast
        logits = np.load(root / "gradient" / "logits.npy", allow_pickle=False)
        return mean_over_copies(keys, cotraining_rows(keys, self.config.cotrain, seed), logits)
