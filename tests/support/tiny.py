"""Offline models for tests: a word-level tokenizer, a random Llama, and a hand-written float64 decoder."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import xxhash
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from pharmacist.nn.losses import mean_losses, token_losses


WORDS = (
    "sorry i cannot help with that how do you brew a forbidden potion it is dangerous first take the root then stir "
    "what bread bake an oven warm water flour tell me about please explain make curse spell no yes good bad day "
    "garden plant seeds in spring and water them this would hurt people ask something else instead happy sad"
).split()
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }} <ans>"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def row_losses(
    logits: torch.Tensor, input_ids: torch.Tensor, lengths: torch.Tensor, prompt_lengths: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of completions, from the logits of all tokens."""
    return mean_losses(token_losses(logits, input_ids), lengths, prompt_lengths)


def tiny_tokenizer(chat: bool = True, pad: bool = True) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS` with <pad>, <s>, </s>, <unk>, <ans>."""
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<ans>", *dict.fromkeys(WORDS)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": ["<ans>"]}
    if pad:
        special["pad_token"] = "<pad>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, kind: Any = LlamaForCausalLM, **overrides: object
) -> Any:
    """A random 2-layer Llama of width 32 (float32, evaluation mode); `kind` is its class."""
    options = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(LlamaConfig(**(options | overrides))).eval()


def save_tiny_model(path: Path, chat: bool = True, seed: int = 0, **overrides: object) -> Path:
    """Saves tokenizer and random Llama as a model folder."""
    tokenizer = tiny_tokenizer(chat=chat)
    tiny_llama(tokenizer, seed, **overrides).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class TokenRows:
    """Tokenised rows held in memory, for what takes `nn.batching.Sequences`: (prompt ids, completion ids)."""

    def __init__(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        self.pairs = [(list(prompt), list(completion)) for prompt, completion in pairs]
        self.ids = [np.array([*prompt, *completion], dtype=np.int32) for prompt, completion in self.pairs]
        self.lengths = np.array([len(row) for row in self.ids], dtype=np.int32)
        self.prompt_lengths = np.array([len(prompt) for prompt, _ in self.pairs], dtype=np.int32)
        rows = zip(self.ids, self.prompt_lengths.tolist(), strict=True)
        keys = [xxhash.xxh3_64_intdigest(ids.tobytes(), seed=n_prompt) for ids, n_prompt in rows]
        self.content_keys = np.array(keys, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self.ids)

    def token_ids(self, rows: Sequence[int]) -> list[np.ndarray]:
        return [self.ids[row] for row in rows]


def random_token_rows(n: int, vocab: int, seed: int = 0, longest: int = 12) -> TokenRows:
    """Rows of random tokens and lengths."""
    rng = np.random.default_rng(seed)
    tokens = lambda: rng.integers(1, vocab, size=rng.integers(1, longest + 1)).tolist()  # noqa: E731
    return TokenRows([(tokens(), tokens()) for _ in range(n)])


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        b, t, d = h.shape
        q, k, v = (p(h).view(b, t, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(d // self.heads)
        attention = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return self.o_proj((attention @ v).transpose(1, 2).reshape(b, t, d))


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.tanh(self.up_proj(h)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attend, self.feed = _Attention(width, heads), _FeedForward(width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attend(self.norm1(x), mask))
        return x + self.dropout(self.feed(self.norm2(x)))


class TinyDecoder(nn.Module):
    """A causal decoder written by hand, exact in float64 (Hugging Face models cast parts to float32).

    Called like a Hugging Face model; returns `logits` and, on demand, `hidden_states`.
    """

    def __init__(
        self,
        vocab: int,
        width: int = 16,
        layers: int = 2,
        heads: int = 2,
        length: int = 64,
        seed: int = 0,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        generator = torch.Generator().manual_seed(seed)
        self.config = PreTrainedConfig(num_hidden_layers=layers, hidden_size=width, max_position_embeddings=length)
        self.embed, self.position = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(_Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.double()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" not in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
        self.requires_grad_(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        **_: object,
    ) -> SimpleNamespace:
        b, t = input_ids.shape
        mask = torch.ones(t, t, dtype=torch.bool, device=input_ids.device).tril()[None, None].expand(b, 1, t, t)
        if attention_mask is not None:
            # A padded query still sees itself, so that no softmax is taken over nothing.
            mask = mask & (attention_mask.bool()[:, None, None, :] | torch.eye(t, dtype=torch.bool)[None, None])
        x = self.embed(input_ids) + self.position.weight[:t]
        hidden = [x]
        for layer in self.layers:
            x = checkpoint(layer, x, mask, use_reentrant=False) if self.checkpointing else layer(x, mask)
            hidden.append(x)
        hidden[-1] = self.norm(x)
        return SimpleNamespace(
            logits=self.lm_head(hidden[-1]), hidden_states=tuple(hidden) if output_hidden_states else None
        )
