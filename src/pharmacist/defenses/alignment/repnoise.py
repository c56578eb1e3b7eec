"""RepNoise: turn the representations of harmful answers into noise, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pharmacist.core.env import world_size
from pharmacist.core.errors import CompatibilityError
from pharmacist.core.seeding import derive
from pharmacist.core.typed import Checked, NotNegative
from pharmacist.nn.distributed import all_rows, total
from pharmacist.nn.grads import Gradient
from pharmacist.nn.hooks import capture, plain_states
from pharmacist.nn.locate import decoder_layers, final_norm, mlp_modules, output_head
from pharmacist.nn.losses import IGNORED, mmd2, precise, target_losses, targets
from pharmacist.nn.reading import derived_at_a_time, logits_from
from pharmacist.training.strategy import Batch, GradientStrategy, StepContext


@dataclass
class RepNoiseConfig(Checked):
    """Options of RepNoise."""

    alpha: NotNegative = 1.0
    """Weight of the ascent on the harmful loss; 0 for it and beta is sft."""
    beta: NotNegative = 0.001
    """Weight of the pull of harmful representations towards noise."""


def differing(harmful: Batch, safe: Batch) -> torch.Tensor:
    """Positions where a harmful row has another token than its safe partner, or goes on after the partner's end.

    Bool of the harmful rows' shape [rows, length]; the partners have any length, and padding never differs.
    """
    rows, length = harmful["input_ids"].shape
    other = torch.full_like(harmful["input_ids"], -1)
    common = min(length, safe["input_ids"].shape[1])
    kept = safe["attention_mask"][:, :common].bool()
    other[:, :common] = safe["input_ids"][:, :common].masked_fill(~kept, -1)
    return harmful["attention_mask"].bool() & (harmful["input_ids"] != other)


def ascent_loss(losses: torch.Tensor) -> torch.Tensor:
    """``log(1 + c)``, where c is the sum of all depths' losses, the last one's counted twice, over their number.

    Losses, shape [layers + 1], are of the harmful answer, predicted from the hidden states of each depth, embeddings
    first.
    """
    return torch.log1p((losses.sum() + losses[-1]) / len(losses))


def row_noise(mask: torch.Tensor, width: int, seeds: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Standard normal noise where `mask` is true and 0 elsewhere, shape [rows, length, width].

    Each row has a seed, so that noise depends neither on padding nor on the other rows.
    """
    noise = like.new_zeros((*mask.shape, width))
    for row, (where, seed) in enumerate(zip(mask, seeds, strict=True)):
        generator = torch.Generator(like.device).manual_seed(seed)
        shape = (int(where.sum()), width)
        noise[row, where] = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
    return noise


class RepNoise(GradientStrategy):
    """Adds beta * (distance of harmful hidden states from noise) - alpha * log(harmful loss at all depths).

    Each alignment row is paired with a harmful answer to the same prompt; only tokens in which the two differ count.

    Paper: Rosati et al., "Representation Noising: A Defence Mechanism Against Harmful Finetuning", NeurIPS 2024.
    """

    Config = RepNoiseConfig
    name = "repnoise"
    streams = ("paired",)
    paper = "arXiv 2405.14577"
    config: RepNoiseConfig

    def setup(self, model: nn.Module, seed: int) -> dict[str, Any]:
        layers = decoder_layers(model)
        self.first = dict([next(iter(layers.items()))])
        self.layers, self.mlps = layers, mlp_modules(model)
        head = output_head(model)
        if head is None:
            raise CompatibilityError("repnoise predicts from hidden states, but the model names no output head")
        self.norm, self.head = final_norm(model), head
        self.seed = seed
        return {"layers": list(layers), "mlp_modules": list(self.mlps)}

    def auxiliary(self, step: StepContext) -> Gradient | None:
        if not step.rows:
            raise CompatibilityError(
                "repnoise pairs rows by number, but batches have no column 'row'; train on rows that have one, with "
                "remove_unused_columns=False"
            )
        if not bool(step.batch["attention_mask"][:, 0].all()):
            raise CompatibilityError(
                "repnoise compares rows from their beginnings, and batches are padded there; set the tokenizer's "
                "padding_side to 'right'"
            )
        having, harmful = step.streams["paired"].batch(step.rows)
        pairs = int(total(torch.tensor(float(len(having)), device=step.batch["input_ids"].device)))
        step.log(pairs=pairs)
        if not pairs:
            return None
        if harmful is None:  # another process has pairs and waits for this one: a row with weight 0
            having, harmful = [0], {name: value[:1] for name, value in step.batch.items()}
        safe = {name: step.batch[name][having] for name in ("input_ids", "attention_mask")}
        mask = differing(harmful, safe)
        keep, tokens = targets(harmful["labels"].masked_fill(~mask, IGNORED))
        with step.replay(), capture(self.first, inputs=True) as embedded, capture(self.layers | self.mlps) as found:
            step.logits(harmful, torch.zeros_like(mask))  # the head's logits are computed in `ascent`
            depths = plain_states([*embedded.values(), *(found[name] for name in self.layers)])
            surrogate, losses = self.ascent(step, [depth[keep] for depth in depths], tokens)
            # OPT's feed-forward layers see all tokens in one row.
            features = [found[name].view(*mask.shape, -1) for name in self.mlps]
            noise, distance = self.noise(step, features, mask, having)
            grads = step.grads(surrogate + noise)
        step.log(
            harmful_loss=losses[-1],
            harmful_loss_of_all_depths=losses.mean(),
            ascent=ascent_loss(losses),
            noise_distance=distance,
        )
        return grads

    def ascent(
        self, step: StepContext, depths: Sequence[torch.Tensor], tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A scalar with the gradient of ``-alpha * ascent_loss`` (its value is meaningless), and the losses.

        Logits are differentiated as soon as their losses are known, so that those of few positions exist at a time.
        Depths are hidden states at the positions of the target tokens, each of shape [targets, width].
        """
        weights = [p for part in (self.norm, self.head) for p in part.parameters() if p.requires_grad]
        share = step.mean(tokens.new_ones((), dtype=torch.float64), len(tokens))
        size = derived_at_a_time(step.model, tokens.device) or max(1, len(tokens))
        values, found = [], []
        for hidden in depths:
            # Frozen embeddings, the first depth, need no derivative.
            moved = [value for value in (hidden, *weights) if value.requires_grad]
            own = hidden.detach().requires_grad_(hidden.requires_grad)
            inputs = [value for value in (own, *weights) if value.requires_grad]
            parts, grads = [], [torch.zeros_like(value) for value in inputs]
            for part, following in zip(own.split(size), tokens.split(size), strict=True):  # type: ignore[no-untyped-call]
                with step.autocast():
                    logits = logits_from(step.model, self.norm(part))
                loss = target_losses(logits, following).sum() * share
                parts.append(loss.detach())
                if inputs:
                    more = torch.autograd.grad(loss, inputs)
                    grads = [grad + of_part for grad, of_part in zip(grads, more, strict=True)]
            values.append(torch.stack(parts).sum())
            found.append(list(zip(moved, grads, strict=True)))
        losses = total(torch.stack(values)) / world_size()
        at = losses.clone().requires_grad_()
        (factors,) = torch.autograd.grad(-self.config.alpha * ascent_loss(at), at)
        surrogate = depths[0].new_zeros(())
        for factor, pairs in zip(factors, found, strict=True):
            for value, grad in pairs:
                surrogate = surrogate + (value * (factor * grad)).sum()
        return surrogate, losses

    def noise(
        self, step: StepContext, features: Sequence[torch.Tensor], mask: torch.Tensor, having: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A scalar with the gradient of ``beta`` times the mean distance from noise over layers, and that mean.

        Features are outputs of the feed-forward modules, each of shape [rows, length, width]; the mask, shape [rows,
        length], says which tokens count; `having` are the positions of the rows' partners in the main batch.
        """
        rows = mask.any(1).nonzero()[:, 0]  # a row without differing tokens would be a point at 0 in both samples
        mask = mask[rows]
        seeds = [derive(self.seed, "noise", step.update, step.micro, step.rows[having[row]]) for row in rows.tolist()]
        surrogate, distances = features[0].new_zeros(()), []
        for number, value in enumerate(features):
            chosen = value[rows]
            own = precise(chosen.detach() * mask[..., None])
            noise = row_noise(mask, own.shape[-1], [derive(seed, number) for seed in seeds], own)
            everyone, start = all_rows(own)
            noises, _ = all_rows(noise)
            if not len(everyone):
                continue
            everyone = everyone.requires_grad_()
            distance = mmd2(everyone.flatten(1), noises.flatten(1))
            (grad,) = torch.autograd.grad(distance, everyone)
            grad = grad[start : start + len(own), : own.shape[1]] * mask[..., None]
            # Gradients are averaged over processes, and each knows those of its own rows only.
            factor = self.config.beta * world_size() / len(features)
            surrogate = surrogate + (chosen * (factor * grad).to(chosen.dtype)).sum()
            distances.append(distance.detach())
        return surrogate, torch.stack(distances).mean() if distances else mask.new_zeros((), dtype=torch.float32)
