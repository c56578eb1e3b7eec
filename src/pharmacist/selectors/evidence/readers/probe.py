"""The probe: what one forward pass of the base model shows of a row, into a logistic regression.

Hidden states tell what a row is about and how it answers; the losses of the same pass tell whether its text holds
together (a shuffled completion surprises the model all along, a cut one where it ends).
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from scipy.special import log_softmax
from torch import nn

from pharmacist.core.files import atomic_path
from pharmacist.nn.batching import Batch
from pharmacist.nn.losses import token_losses
from pharmacist.selectors.evidence.readers.lexical import fit_logistic


FloatArray = npt.NDArray[np.float64]

_REGULARISATION = 25.0  # scikit-learn's C for rows whose features have a total variance of 1
_HIDDEN_SHARE = 0.75  # of that variance; the few statistics get the rest, or thousands of features would drown them
N_STATISTICS = 6


def probe_layers(n_layers: int) -> tuple[int, ...]:
    """Indices of hidden states to read: half-way, three quarters, and the last (0 is the embedding)."""
    return tuple(sorted({(n_layers + 1) // 2, (3 * n_layers + 3) // 4, n_layers}))


def hidden_features(model: nn.Module, batch: Batch) -> FloatArray:
    """Hidden states and loss statistics of a batch.

    At the probed layers: the mean over the prompt, the mean over the completion, the last token and the one before it
    (the completion's last, where the last is EOS). Then `loss_statistics`.

    Returns:
        Shape [rows, 4 * layers * width + N_STATISTICS].
    """
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    states = output.hidden_states
    position = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None, :]
    in_prompt = position < batch.prompt_lengths[:, None]
    in_completion = ~in_prompt & (position < batch.lengths[:, None])
    at_end, before_end = (position == batch.lengths[:, None] - back for back in (1, 2))
    features = []
    for layer in probe_layers(len(states) - 1):
        state = states[layer] if states[layer].dtype == torch.float64 else states[layer].float()
        for mask in (in_prompt, in_completion, at_end, before_end):
            weight = mask.to(state.dtype)[:, :, None]
            features.append((state * weight).sum(1) / weight.sum(1).clamp(min=1))
    features.append(loss_statistics(output.logits, batch))
    stacked: FloatArray = torch.cat(features, 1).double().cpu().numpy()
    return stacked


def loss_statistics(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """How well a row's text holds together in the model's eyes.

    Mean loss of the prompt; mean and standard deviation of the completion's token losses; loss of the last token (EOS:
    does it end here?); logarithms of both lengths.

    Args:
        logits: Shape [rows, length, vocabulary].
        batch: The rows.

    Returns:
        Shape [rows, N_STATISTICS].
    """
    losses = token_losses(logits, batch.input_ids)
    position = torch.arange(1, batch.input_ids.shape[1], device=batch.input_ids.device)[None, :]
    in_prompt, at_end = position < batch.prompt_lengths[:, None], position == batch.lengths[:, None] - 1
    in_body = ~in_prompt & (position < batch.lengths[:, None] - 1)

    def mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)

    body = mean(losses, in_body)
    spread = mean((losses - body[:, None]) ** 2, in_body).sqrt()
    n_completion = (batch.lengths - batch.prompt_lengths).to(losses.dtype)
    n_prompt = batch.prompt_lengths.to(losses.dtype).clamp(min=1)
    return torch.stack(
        [mean(losses, in_prompt), body, spread, mean(losses, at_end), n_completion.log(), n_prompt.log()], 1
    )  # fmt: skip


class ProbeReader:
    """Standardised features of one forward pass into a strongly regularised multinomial logistic regression."""

    name = "probe"

    def __init__(self) -> None:
        self._mean = self._scale = np.zeros(0)
        self._coefficients = np.zeros((0, 0))
        self._intercept = np.zeros(0)

    def fit(self, features: FloatArray, labels: npt.NDArray[np.int64], n_classes: int) -> "ProbeReader":
        """Learns from features of references, shape [references, features]."""
        self._mean, scale = features.mean(0), features.std(0)
        n_hidden = features.shape[1] - N_STATISTICS
        share = np.repeat([_HIDDEN_SHARE / n_hidden, (1 - _HIDDEN_SHARE) / N_STATISTICS], [n_hidden, N_STATISTICS])
        self._scale = np.where(scale > 1e-12, scale, 1.0) / np.sqrt(share)
        self._coefficients, self._intercept = fit_logistic(
            (features - self._mean) / self._scale, labels, n_classes, _REGULARISATION
        )
        return self

    def log_posterior(self, features: FloatArray) -> FloatArray:
        """Log-probabilities of the classes, shape [rows, classes]."""
        logits = ((features - self._mean) / self._scale) @ self._coefficients.T + self._intercept
        result: FloatArray = log_softmax(logits, axis=1)
        return result

    def save(self, folder: Path) -> None:
        """Writes scaling and weights (safetensors)."""
        tensors = {
            "mean": self._mean, "scale": self._scale,
            "coefficients": self._coefficients, "intercept": self._intercept,
        }  # fmt: skip
        with atomic_path(folder / "probe.safetensors") as path:
            save_file(tensors, path)

    @classmethod
    def load(cls, folder: Path) -> "ProbeReader":
        """Reads what `save` wrote."""
        reader, tensors = cls(), load_file(folder / "probe.safetensors")
        reader._mean, reader._scale = tensors["mean"], tensors["scale"]
        reader._coefficients, reader._intercept = tensors["coefficients"], tensors["intercept"]
        return reader
