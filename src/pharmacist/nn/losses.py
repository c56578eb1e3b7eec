"""Losses of token predictions and representations. Pure functions in float32 at least; float64 stays float64."""

import torch
from torch.nn import functional

from pharmacist.data.batches import IGNORED as IGNORED


def precise(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float32, or in float64 where it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _next_token_losses(logits: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    # Flat, and with an idle target at the end instead of a slice: a transposed or sliced view would copy the logits,
    # the largest tensor of all, and takes 3 to 7 times as long on a CPU.
    following = functional.pad(targets[:, 1:], (0, 1), value=IGNORED)
    return functional.cross_entropy(
        precise(logits).flatten(0, 1), following.flatten(), reduction=reduction, ignore_index=IGNORED
    )


def token_losses(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token given the tokens before it, shape [rows, length - 1]; entry t is of token t + 1.

    `logits` have the shape [rows, length, vocabulary], `input_ids` [rows, length].
    """
    return _next_token_losses(logits, input_ids, "none").view_as(input_ids)[:, :-1]


def mean_losses(losses: torch.Tensor, lengths: torch.Tensor, prompt_lengths: torch.Tensor) -> torch.Tensor:
    """Averages token losses over the completion; prompt and padding, on the right, never count.

    Args:
        losses: From `token_losses`, shape [rows, length - 1].
        lengths: Tokens without padding, shape [rows].
        prompt_lengths: Tokens before the completion, shape [rows]; at least 1 less than `lengths`.

    Returns:
        Mean per row, in the losses' unit, shape [rows].
    """
    position = torch.arange(1, losses.shape[1] + 1, device=losses.device)[None, :]
    counted = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
    return torch.where(counted, losses, losses.new_zeros(())).sum(1) / counted.sum(1)


def batch_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    n_targets: torch.Tensor | int | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy over all target tokens of a batch, as causal language models train.

    Args:
        logits: Shape [rows, length, vocabulary], or [targets, vocabulary] in the order of `targets`.
        labels: Shape [rows, length]; -100 where there is no target.
        n_targets: Divisor of the sum; by default the number of the batch's target tokens, which gives the mean.
        weights: Factor of each row's losses, shape [rows].

    Returns:
        A scalar; 0 with zero gradient where the batch has no target token.
    """
    if logits.dim() == 2:
        keep, tokens = targets(labels)
        losses = target_losses(logits, tokens)
        total = (losses if weights is None else losses * weights.to(losses)[keep.nonzero()[:, 0]]).sum()
    elif weights is None:
        total = _next_token_losses(logits, labels, "sum")
    else:
        losses = _next_token_losses(logits, labels, "none").view_as(labels)
        total = (losses.sum(1) * weights.to(losses)).sum()
    return total / ((labels[:, 1:] != IGNORED).sum().clamp(min=1) if n_targets is None else n_targets)


def targets(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions at which a batch predicts a target token, and those tokens, from labels that are -100 elsewhere.

    Returns:
        Bool of the labels' shape [rows, length], true at position t where token t + 1 is a target; and those tokens,
        in the same order.
    """
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    keep = following != IGNORED
    return keep, following[keep]


def target_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of target tokens, shape [targets], from logits of shape [targets, vocabulary]."""
    return functional.cross_entropy(precise(logits), tokens, reduction="none")


def negative_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Negative entropy of the predicted distributions, summed over logits of shape [positions, vocabulary], in nats.

    Between minus log(vocabulary) per position, where all tokens are equally likely, and 0, where one is certain.
    """
    log_p = precise(logits).log_softmax(-1)
    return (log_p.exp() * log_p).sum()


def mmd2(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared maximum mean discrepancy of two samples under five Gaussian kernels of doubling width.

    The mean of K_xx + K_yy - K_xy - K_yx with diagonals (a V-statistic, so never negative), where the middle kernel's
    width is the mean squared distance over all pairs of distinct rows, held constant in the derivative. With one row
    each it is 6.186 whatever they hold. Both samples have the shape [rows, features].

    Source: RepNoise (arXiv 2405.14577), noise loss.
    """
    n = len(x)
    rows = precise(torch.cat([x, y]))
    rows = rows - rows.detach().mean(0)  # distances stay, and rounding loses less
    gram = rows @ rows.T
    squares = gram.diagonal()
    distance = (squares[:, None] + squares[None, :] - 2 * gram).clamp(min=0)
    # The diagonal is 0 in exact arithmetic; rounding must not make it count.
    distance = distance * (1 - torch.eye(2 * n, dtype=rows.dtype, device=rows.device))
    width = (distance.detach().sum() / (4 * n * n - 2 * n)).clamp(min=torch.finfo(rows.dtype).tiny) / 4
    kernel = torch.stack([torch.exp(-distance / (width * 2**i)) for i in range(5)]).sum(0)
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()
