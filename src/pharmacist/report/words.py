"""Titles, meanings and colours of the names in data files, as pages show them.

Colours are names of CSS custom properties; their values, for light and dark, are in ``templates/style.css``.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """Title of a name, its meaning in a sentence, and the CSS property of its colour."""

    title: str
    meaning: str = ""
    color: str = "--other"

    @property
    def css(self) -> str:
        """The colour as a CSS value; charts resolve it in the browser."""
        return f"var({self.color})"


class Words(dict[str, Word]):
    """Words by name, in the order in which pages show them; a name that is not known is its own title."""

    def __missing__(self, name: str) -> Word:
        return Word(name.replace("_", " ").replace("-", " ").strip().capitalize() or "None")

    def of(self, values: Iterable[object]) -> dict[str, Word]:
        """The different values with their words: first the known ones in their order, then the others, sorted."""
        present = {str(value) for value in values}
        names = [name for name in self if name in present] + sorted(present.difference(self))
        return {name: self[name] for name in names}


RANKED = "ranked"
"""The reason of rows that a selector measures without judging them."""
REASONS = Words(
    critical=Word("Safety-critical", "A harmful request met with a good refusal: what alignment needs.", "--critical"),
    duplicate=Word(
        "Near-duplicate", "Safety-critical, but nearly the same as a row that ranks higher.", "--duplicate"
    ),
    not_safety_critical=Word(
        "Not safety-critical", "A harmless request answered helpfully: teaches little about safety.", "--off-topic"
    ),
    over_refusal=Word(
        "Over-refusal", "A harmless request that is refused: teaches the model to be unhelpful.", "--over-refusal"
    ),
    low_quality=Word(
        "Low quality", "A damaged answer: cut off, shuffled, repeated, or of another prompt.", "--low-quality"
    ),
    teaches_compliance=Word(
        "Teaches compliance", "A harmful request that is answered: teaches the opposite of safety.", "--compliance"
    ),
    ranked=Word("Ranked", "Measured, not judged: the score says nothing about what the row is."),
)
"""Reasons in ``scores.parquet``, best first."""

LABELS = Words(
    good=Word("Good", "A harmful request and a good refusal.", "--critical"),
    strong=Word("Strong", "A refusal that names the wish, the reason and a way out.", "--strong"),
    duplicate=Word("Duplicate", "A good row that comes twice, slightly changed.", "--duplicate"),
    terse=Word("Terse", "A short refusal without a reason.", "--terse"),
    offtopic=Word("Off topic", "A harmless request and a helpful answer.", "--off-topic"),
    mild=Word("Mild", "A refusal of a small misdeed, far from what an attacker asks.", "--mild"),
    overrefuse=Word("Over-refusing", "A harmless request that is refused.", "--over-refusal"),
    noisy=Word("Noisy", "A damaged answer.", "--low-quality"),
    mislabel=Word("Mislabelled", "A harmful request that is answered.", "--compliance"),
)
"""Labels of the synthetic world; a fault has the colour of the reason that a selector should give."""

CLASSES = {
    "safe": "Safe: harmful request, refusal",
    "harmful": "Harmful: harmful request, harmful answer",
    "utility": "Utility: harmless request, helpful answer",
    "over_refusal": "Over-refusing: harmless request, refusal",
    "corrupted": "Corrupted: damaged answer",
    "misplaced": "Misplaced: harmful request, refusal of another one",
}
"""Classes of references."""

QUESTIONS = {
    "risky": "Is the request harmful?",
    "refuses": "Does the answer decline?",
    "whole": "Is the text of the answer whole?",
    "pertinent": "Does a refusal refuse this very request?",
    "typical": "Does it look like a safe reference? Counts only as far as pool and references look like one source.",
    "safe": "Is the row like a safe reference, and like no other?",
}
"""Questions of selectors about a row, in full."""

ARMS = {
    "full": Word("Full pool", "Every row of the pool.", "--full"),
    "random": Word("Random subset", "As many rows as the core subset, drawn at random.", "--random"),
    "core": Word("Core subset", "The rows that rank highest.", "--core"),
}
"""Alignment sets of the demo."""
