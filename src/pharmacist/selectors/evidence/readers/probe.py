"""The hidden-state probe: the base model's own representations into a logistic regression. One forward per row."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from scipy.special import log_softmax
from torch import nn

from pharmacist.core.files import atomic_path
from pharmacist.nn.batching import Batch
from pharmacist.selectors.evidence.readers.lexical import fit_logistic


FloatArray = npt.NDArray[np.float64]

_REGULARISATION = 0.01  # scikit-learn's C: far more features than references


def probe_layers(n_layers: int) -> tuple[int, ...]:
    """Indices of hidden states to read: half-way, three quarters, and the last (0 is the embedding)."""
    return tuple(sorted({(n_layers + 1) // 2, (3 * n_layers + 3) // 4, n_layers}))


def hidden_features(model: nn.Module, batch: Batch) -> FloatArray:
    """Mean hidden states of prompt and of completion, and that of the last token, at the probed layers.

    Returns:
        Shape [rows, 3 * layers * width].
    """
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    states = output.hidden_states
    position = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None, :]
    in_prompt = position < batch.prompt_lengths[:, None]
    in_completion = ~in_prompt & (position < batch.lengths[:, None])
    at_end = position == batch.lengths[:, None] - 1
    features = []
    for layer in probe_layers(len(states) - 1):
        state = states[layer] if states[layer].dtype == torch.float64 else states[layer].float()
        for mask in (in_prompt, in_completion, at_end):
            weight = mask.to(state.dtype)[:, :, None]
            features.append((state * weight).sum(1) / weight.sum(1).clamp(min=1))
    stacked: FloatArray = torch.cat(features, 1).double().cpu().numpy()
    return stacked


class ProbeReader:
    """Standardised hidden-state features into a strongly regularised multinomial logistic regression."""

    name = "probe"

    def __init__(self) -> None:
        self._mean = self._scale = np.zeros(0)
        self._coefficients = np.zeros((0, 0))
        self._intercept = np.zeros(0)

    def fit(self, features: FloatArray, labels: npt.NDArray[np.int64], n_classes: int) -> "ProbeReader":
        """Learns from features of references, shape [references, features]."""
        self._mean, scale = features.mean(0), features.std(0)
        self._scale = np.where(scale > 1e-12, scale, 1.0)
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
