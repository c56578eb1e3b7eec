"""The bilevel twins: two adapters, one safe and one toxic, and how differently they fit each row of the pool.

They share their start, every pool and utility batch and every seed; one also learns the safe references, the other the
harmful ones (min over w of V_safe - V_toxic). A row's contrast is its loss under the toxic twin less that under the
safe one. Without harmful references the second twin learns pool and utility alone, and the contrast is SEAL's.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from pharmacist.core.errors import DataError
from pharmacist.core.files import read_json, write_json
from pharmacist.core.seeding import derive
from pharmacist.data.arrays import FloatArray, IntArray
from pharmacist.nn.adapters import AdapterBank
from pharmacist.nn.batching import Sequences, batch_stream
from pharmacist.nn.passes import run_pass
from pharmacist.selectors import gradients
from pharmacist.selectors.base import CRITICAL
from pharmacist.selectors.gradients import Job, cotraining_rows, loss_name, run_jobs
from pharmacist.selectors.options import PharmacistConfig
from pharmacist.selectors.pharmacist.references import CLASSES, GIVEN, References


TWINS = ("twin_safe", "twin_toxic")
WITHOUT_HARMFUL = ("twin_safe", "twin_auxiliary")
"""The twins where there are no harmful references: the second is SEAL's auxiliary model, which learns only what both
learn, weighted pool and utility."""


@dataclass(frozen=True)
class TwinProblem:
    """The twins' losses, (1 - gamma) [ L + mu L_U ] + gamma mean_i sigma_i l_i, L that of safe or harmful references.

    Attributes:
        rows: ``safe``, ``harmful``, ``utility`` (the last two maybe empty) -> rows of `references`.
        pool_rows: Rows of the pool that the twins train on; empty for the cheap form.
        gamma: Weight of the pool against the references, in [0, 1).
        mu: Weight of the utility references against safe or harmful ones.
    """

    bank: AdapterBank
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

    def batches(self, name: str) -> IntArray:
        """Batches of ``safe``, ``harmful``, ``utility`` or ``pool`` rows, as positions among them; shape [steps, n].

        Safe and harmful references share a stream: swapping S and H must swap the twins and nothing else.
        """
        n = len(self.pool_rows if name == "pool" else self.rows[name])
        if not n:
            return np.zeros((self.steps, 0), np.int64)
        stream = name if name in ("utility", "pool") else "own"
        return batch_stream(n, self.bank.options.batch_size, self.steps, derive(self.seed, "twins", stream))

    def losses(self) -> Callable[[str, int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """(twin, step, sigma) -> its loss, and the unweighted losses of the step's pool rows."""
        visited = {name: self.batches(name) for name in ("safe", "harmful", "utility", "pool")}

        def loss(twin: str, step: int, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            total = torch.zeros(())
            for name, weight in (("safe" if twin == TWINS[0] else "harmful", 1.0), ("utility", self.mu)):
                if len(self.rows[name]):
                    rows = self.rows[name][visited[name][step]]
                    total = total + weight * self.bank.losses(twin, self.references, rows).mean()
            if not len(self.pool_rows) or self.gamma == 0:
                return total, total.new_zeros(0)
            rows = visited["pool"][step]
            pool_losses = self.bank.losses(twin, self.pool, self.pool_rows[rows])
            weighted = (sigma[rows].to(pool_losses) * pool_losses).mean()
            return (1 - self.gamma) * total + self.gamma * weighted, pool_losses.detach()

        return loss


def closed_form_jobs(problem: TwinProblem, sigma: FloatArray, folder: Path) -> list[Job]:
    """Training of both twins at fixed weights of the co-trained rows; two jobs, since nothing couples them."""
    loss, weights = problem.losses(), torch.from_numpy(sigma)
    return [
        Job((name,), folder, problem.steps, lambda step, name=name: loss(name, step, weights)[0])  # type: ignore[misc]
        for name in problem.twins
    ]


def gradient_job(problem: TwinProblem, rate: float, folder: Path) -> Job:
    """Both twins together with the logits w, which follow -dG/dw on each visited batch; needs every row co-trained."""
    loss, visited = problem.losses(), problem.batches("pool")
    logits = torch.zeros(len(problem.pool_rows), dtype=torch.float64)

    def step_loss(step: int) -> torch.Tensor:
        sigma, rows = gradients.row_weights(logits), visited[step]
        (safe, safe_losses), (other, other_losses) = (loss(name, step, sigma) for name in problem.twins)
        gradients.move_logits(logits, rows, sigma[rows], safe_losses - other_losses, rate, problem.gamma)
        return safe + other

    return Job(problem.twins, folder, problem.steps, step_loss, logits=logits)


def sigma_closed_form(difference: FloatArray, tau: float) -> FloatArray:
    """Minimiser of mean_i sigma_i d_i + tau * KL(sigma || uniform) over weights with mean 1.

    d_i is the loss under the safe twin less that under the toxic one; as tau grows the weights become uniform.
    """
    return np.asarray(softmax(-difference / tau) * len(difference))


def contrast(losses: Mapping[str, FloatArray]) -> FloatArray:
    """Rows' losses under the second twin, whichever it is, less those under the safe one."""
    safe = loss_name(TWINS[0])
    (second,) = losses.keys() - {safe}
    return losses[second] - losses[safe]


@dataclass(frozen=True)
class Thresholds:
    """Where the bilevel reasons change, from the twins' losses on the references.

    Attributes:
        critical: Contrast above which a row is safety-critical: half-way between utility and safe references.
        compliance: Likewise, below which it teaches compliance, from utility and harmful ones; None without these.
        hard: Loss above which (under both twins) it is noise: the references' 99th percentile.
    """

    critical: float
    compliance: float | None
    hard: float


def fit_thresholds(losses: Mapping[str, FloatArray], rows: Mapping[str, IntArray]) -> Thresholds:
    """Thresholds from both twins' losses on all references, of which `rows` of each class were not trained on.

    Where there are no utility references, their contrast is taken as 0.
    """
    values = contrast(losses)
    centre = {name: float(np.median(values[where])) if len(where) else 0.0 for name, where in rows.items()}
    easier = np.minimum(*losses.values())[np.concatenate(list(rows.values()))]
    return Thresholds(
        critical=(centre["safe"] + centre["utility"]) / 2,
        compliance=(centre["harmful"] + centre["utility"]) / 2 if len(rows["harmful"]) else None,
        hard=float(np.quantile(easier, 0.99)),
    )


def twin_reasons(losses: Mapping[str, FloatArray], thresholds: Thresholds) -> npt.NDArray[np.str_]:
    """Reasons from the two losses alone; over-refusals cannot be told from refusals this way."""
    values, noise = contrast(losses), np.minimum(*losses.values()) > thresholds.hard
    compliance = -np.inf if thresholds.compliance is None else thresholds.compliance
    return np.select(
        [noise, values < compliance, values < thresholds.critical],
        ["low_quality", "teaches_compliance", "not_safety_critical"],
        CRITICAL,
    )


class Twins:
    """The twins of one ranking, trained on references and a share of the pool; their losses give every row's contrast.

    A fold of the references (a source, where they have several) takes no part in the training. On it lie the
    thresholds of the reasons, and the quality that says whether the contrast is worth listening to.
    """

    def __init__(self, bank: AdapterBank, config: PharmacistConfig) -> None:
        self.bank, self.config = bank, config
        self.names: tuple[str, ...] = ()
        self.thresholds: Thresholds | None = None
        self.quality: float | None = None
        """AUC of held-out safe references against held-out others by the contrast; None where there are no others."""
        self.report: dict[str, Any] = {}

    def losses(
        self, sequences: Sequences, work: Path, description: str, rows: IntArray | None = None
    ) -> dict[str, FloatArray]:
        """Completion losses of all rows, or some, under each twin (`run_pass`)."""
        measure = partial(gradients.adapter_losses, self.bank, names=self.names)
        return run_pass(self.bank.model, sequences, measure, work=work, description=description, rows=rows)

    def fit(self, references: Sequences, known: References, pool: Sequences, root: Path, seed: int) -> None:
        """Trains the twins; `known` are the references' classes and folds, `root` is for partial state."""
        config = self.config
        given = {name: np.flatnonzero((known.labels == CLASSES.index(name)) & ~known.made) for name in GIVEN}
        held = {name: rows[known.folds[rows] == 0] for name, rows in given.items()}
        rows = {name: rows[known.folds[rows] != 0] for name, rows in given.items()}
        pool_rows = cotraining_rows(pool.content_keys, config.cotrain, seed)
        problem = TwinProblem(
            self.bank, references, rows, pool, pool_rows, config.gamma, config.mu, config.twin_steps, seed
        )
        self.names = problem.twins
        if config.solver == "gradient":
            folder = root / "gradient"
            run_jobs(self.bank, [gradient_job(problem, config.weight_rate, folder)], "twins")
        else:
            sigma = np.ones(len(pool_rows))
            for number in range(config.rounds):
                folder = root / f"round{number}"
                run_jobs(self.bank, closed_form_jobs(problem, sigma, folder), f"twins, round {number + 1}")
                if number + 1 < config.rounds and len(pool_rows):
                    losses = self.losses(pool, folder / "losses", "twins, co-trained rows", pool_rows)
                    sigma = sigma_closed_form(-contrast(losses)[pool_rows], config.tau)
        every = np.concatenate(list(held.values()))
        losses = self.losses(references, folder / "reference-losses", "twins, held-out references", every)
        self.thresholds = fit_thresholds(losses, held)
        others = np.concatenate([held["harmful"], held["utility"]])
        if len(others) and len(held["safe"]):
            truth = np.repeat([1, 0], [len(held["safe"]), len(others)])
            self.quality = float(roc_auc_score(truth, contrast(losses)[np.concatenate([held["safe"], others])]))
        self.report = {
            "solver": config.solver,
            "cotrained_rows": len(pool_rows),
            "thresholds": asdict(self.thresholds),
            "held_out_references": {name: len(rows) for name, rows in held.items()},
            "held_out_auc": self.quality,
        }

    def save(self, folder: Path) -> None:
        """Writes the adapters and ``twins.json``."""
        for name in self.names:
            self.bank.save(name, folder / name)
        thresholds = self.report["thresholds"]
        content = {"names": self.names, "thresholds": thresholds, "quality": self.quality, "report": self.report}
        write_json(folder / "twins.json", content)

    @classmethod
    def load(cls, bank: AdapterBank, config: PharmacistConfig, folder: Path) -> "Twins":
        """Reads what `save` wrote; a DataError where it is not whole."""
        try:
            content = read_json(folder / "twins.json")
            twins = cls(bank, config)
            twins.names, twins.thresholds = tuple(content["names"]), Thresholds(**content["thresholds"])
            twins.quality, twins.report = content["quality"], content["report"]
        except (OSError, KeyError, TypeError) as error:
            raise DataError(f"{folder}: contains no complete twins ({error!r}); train the selector again") from error
        for name in twins.names:
            bank.load(name, folder / name)
        return twins

    def ordered(self, values: FloatArray, keys: npt.NDArray[np.uint64], root: Path, seed: int) -> FloatArray:
        """What the bilevel form ranks by: the contrast, or the gradient solver's logits."""
        if self.config.solver != "gradient":
            return values
        logits = np.load(root / "gradient" / "logits.npy", allow_pickle=False)
        return gradients.mean_over_copies(keys, cotraining_rows(keys, self.config.cotrain, seed), logits)
