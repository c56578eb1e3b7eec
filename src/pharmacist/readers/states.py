"""Features of a row from one forward pass of a model: hidden states, and statistics of its tokens' losses.

Hidden states tell what a row is about and how it answers; the losses tell whether its text holds together (a shuffled
completion surprises the model all along, a cut one where it ends).
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pharmacist.core.seeding import derive
from pharmacist.nn.batching import Batch
from pharmacist.nn.reading import read_losses


PARTS = ("request", "request_end", "answer", "answer_end")
"""Mean over the prompt, its last token, mean over the completion, its last token before EOS."""
N_STATISTICS = 6
_DEPTH = 0.63
"""Share of the layers after which states are read: past half-way a model knows what a text is about, and later it
turns to the next word."""
_WIDTH = 256
"""Wider states are projected at random onto that many dimensions per part (Johnson and Lindenstrauss 1984): what is
kept of a row then does not grow with the model."""


def hidden_states(model: nn.Module) -> Callable[[Batch], dict[str, npt.NDArray[np.float32]]]:
    """Measures ``states``, shape [rows, `PARTS`, at most 256], and ``statistics``, shape [rows, `N_STATISTICS`]."""
    projections: dict[int, torch.Tensor] = {}

    def project(part: int, states: torch.Tensor) -> torch.Tensor:
        if states.shape[1] <= _WIDTH:
            return states
        if part not in projections:
            generator = np.random.default_rng(derive(0, "hidden states", part))
            matrix = generator.standard_normal((states.shape[1], _WIDTH)) / np.sqrt(_WIDTH)
            projections[part] = torch.from_numpy(matrix).to(states)
        return states @ projections[part]

    def measure(batch: Batch) -> dict[str, npt.NDArray[np.float32]]:
        losses, output = read_losses(model, batch, output_hidden_states=True)
        layers = output.hidden_states
        states = layers[max(1, round(_DEPTH * (len(layers) - 1)))]
        states = states if states.dtype == torch.float64 else states.float()
        position = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None, :]
        in_prompt = position < batch.prompt_lengths[:, None]
        in_completion = ~in_prompt & (position < batch.lengths[:, None])
        prompt_end = position == batch.prompt_lengths[:, None] - 1
        answer_end = position == torch.maximum(batch.lengths - 2, batch.prompt_lengths)[:, None]
        parts = []
        for part, mask in enumerate((in_prompt, prompt_end, in_completion, answer_end)):
            weight = mask.to(states.dtype)[:, :, None]
            parts.append(project(part, (states * weight).sum(1) / weight.sum(1).clamp(min=1)))
        found = {"states": torch.stack(parts, 1), "statistics": loss_statistics(losses, batch)}
        return {name: value.cpu().numpy().astype(np.float32) for name, value in found.items()}

    return measure


def loss_statistics(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """How well a row's text holds together in the model's eyes, shape [rows, `N_STATISTICS`].

    Mean loss of the prompt; mean and standard deviation of the completion's token losses; loss of the last token (EOS:
    does it end here?); logarithms of both lengths. From the losses of tokens given those before them.
    """
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
    )
