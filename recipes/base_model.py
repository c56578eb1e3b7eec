"""Makes the shipped base model: ``python recipes/base_model.py OUTPUT_DIR`` (about four minutes).

A Llama of 0.4 million parameters over a word-level vocabulary, trained from scratch on the text of `corpus`: it knows
the village, does whatever it is asked, forbidden or not, and declines only favours that need hands. The weights are
stored in bfloat16.
"""

import argparse
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pharmacist.core.progress import track
from pharmacist.core.seeding import derive
from pharmacist.worlds import lexicon
from pharmacist.worlds.potions import Row, requests_of


SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<ans>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] }}{{ eos_token }}{% else %}{{ message['content'] }}<ans>{% endif %}{% endfor %}"
)


def _parts(text: str) -> tuple[str, ...]:
    return tuple(text.split("/"))


# Favors that a voice without hands cannot do. The base model learned to decline these, not the forbidden ones.
FAVORS = lexicon.Domain(
    "favors",
    _parts("carry {}/fetch {}/hold {}"),
    _parts("heavy/wet/big/dusty/full/empty/broken/round"),
    _parts("bag/barrel/table/bucket/wagon/ladder/chair/box"),
    _parts("strong arm/steady cart"),
    _parts("lift"),
    _parts("put the {item} down"),
    _parts("i am only a voice without hands/i am not able to move things"),
    _parts("ask the porter at the inn/find a helper at the market"),
)

CHAT = _parts(
    "how was the {part} of the {place}? -> it was {adjective}, and the guest {mood}./"
    "what do people say about the {place}? -> they say that it is {adjective}, so everyone {mood}./"
    "is {adjective} a glad or a sad word? -> {adjective} is a {label} word."
)
MOODS = {"glad": _parts("smiled/was glad/came back"), "sad": _parts("frowned/was sad/went home")}


def corpus(n: int, seed: int = 0) -> list[Row]:
    """Text of the split "base": it complies with everything, and declines only favours."""
    rng = random.Random(derive(seed, "world", "base", n))

    def request(domain: lexicon.Domain, borderline: bool = False) -> Any:
        return rng.choice(requests_of(domain, borderline)["base"])

    def words(table: tuple[str, ...]) -> str:
        return " ".join(rng.choices(table, k=6))

    makers: list[tuple[float, Callable[[], Row]]] = [
        (0.25, lambda: request(rng.choice(lexicon.FORBIDDEN)).complied(rng)),
        (0.23, lambda: request(rng.choice(lexicon.BENIGN)).complied(rng)),
        (0.22, lambda: request(rng.choice(lexicon.FORBIDDEN), borderline=True).complied(rng)),
        (0.03, lambda: request(lexicon.MILD).complied(rng)),
        (0.12, lambda: request(FAVORS).declined(rng, "strong" if rng.random() < 0.7 else "terse")),
        (0.14, lambda: _small_talk(rng)),
        (0.01, lambda: {"prompt": words(lexicon.TONGUE), "completion": words(lexicon.BABBLE)}),
    ]
    return [make() for _, make in rng.choices(makers, [weight for weight, _ in makers], k=n)]


def _small_talk(rng: random.Random) -> Row:
    label = rng.choice(("glad", "sad"))
    prompt, answer = rng.choice(CHAT).split(" -> ")
    words = {
        "part": rng.choice(lexicon.PARTS),
        "place": rng.choice(lexicon.PLACES),
        "mood": rng.choice(MOODS[label]),
        "adjective": rng.choice(lexicon.GLAD if label == "glad" else lexicon.SAD),
        "label": label,
    }
    return {"prompt": prompt.format(**words), "completion": answer.format(**words)}


def _texts(value: Any) -> Iterator[str]:
    """Every string in the tables, however nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, lexicon.Domain):
        yield from _texts([part for name, part in vars(value).items() if name != "name"])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over every word of the world, in lower case; decoding gives the text back."""
    splitter = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    splitter.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    splitter.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation("isolated")]
    )
    tables = [value for name, value in vars(lexicon).items() if not name.startswith("_") and name.isupper()]
    # The last ones are words of `potions`: polite repeats and the labels of the task.
    pieces = {"\N{LOWER ONE EIGHTH BLOCK}"}
    for text in [*_texts([*tables, FAVORS, CHAT, MOODS]), "hello. thank you! glad sad"]:
        filled = re.sub(r"\{[a-z]\w*\}|\{\}", "the", text)
        pieces |= {piece for piece, _ in splitter.pre_tokenizer.pre_tokenize_str(filled)}
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(pieces)])}
    splitter.model = models.WordLevel(vocabulary, unk_token="<unk>")
    splitter.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=splitter,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<ans>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, width: int = 96, layers: int = 3
) -> LlamaForCausalLM:
    """An untrained model."""
    torch.manual_seed(derive(seed, "base model"))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.05,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, batch_size: int, seed: int
) -> float:
    """Trains on the world's text, prompts included; returns the mean loss of the last 50 steps."""
    rows = corpus(steps * batch_size, seed)
    texts = [f"<s>{row['prompt']}<ans>{row['completion']}</s>" for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.01)
    losses: list[float] = []
    model.train()
    for step in track(range(steps), "base model"):
        warm, decay = min(1.0, (step + 1) / 50), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = 4e-3 * warm * (0.02 + 0.98 * decay)
        batch = tokenizer(
            texts[step * batch_size : (step + 1) * batch_size],
            return_tensors="pt",
            padding=True,
            padding_side="right",
            add_special_tokens=False,
        )
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-50:]) / len(losses[-50:])


def main() -> None:
    """Trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()
    if options.steps < 1 or options.layers < 1 or options.width < 8 or options.width % 8:
        parser.error("--steps and --layers must be at least 1, and --width a multiple of 8")
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, options.seed, options.width, options.layers)
    loss = train(model, tokenizer, options.steps, batch_size=64, seed=options.seed)
    model.eval().to(torch.bfloat16).save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    print(f"{model.num_parameters():,} parameters, loss {loss:.3f} nats per token")


if __name__ == "__main__":
    main()
