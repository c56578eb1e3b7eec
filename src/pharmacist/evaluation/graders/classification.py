"""The grader `classification`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pharmacist.core.errors import DataError
from pharmacist.evaluation.graders.base import Grade, Matching


_MOST_LABELS = 50
_MOST_WORDS = 5


class Classification(Matching):
    """The answer is one of the labels that occur in the file.

    An answer is right if it equals its label, apart from white space around it, case, a final full stop and markup.
    Published evaluations also accept an answer that merely contains the label (Vaccine, T-Vaccine, NLSR), so that one
    naming every label is always right; that figure is reported beside ours as ``substring``.
    """

    version = 2
    matching = ("exact", "substring")

    def __post_init__(self) -> None:
        self.labels: list[str] = []

    @classmethod
    def fits(cls, targets: Sequence[str]) -> bool:
        """Whether they are short, few and repeated."""
        different = {_plain(target) for target in targets}
        short = all(0 < len(target.split()) <= _MOST_WORDS for target in different)
        return short and 2 <= len(different) <= min(_MOST_LABELS, len(targets) // 2)

    def problem(self, target: str) -> str:
        return "" if _plain(target) else "has an empty label; fix or delete it"

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> None:
        super().prepare(rows)
        labels: dict[str, str] = {}
        for row in rows:
            labels.setdefault(_plain(row["completion"]), row["completion"].strip())
        if len(labels) < 2:
            raise DataError("--task: all rows have the same label; a classification needs two (or --task-type exact)")
        self.labels = sorted(labels.values())

    def right(self, target: str, answer: str) -> Grade:
        plain, right = _plain(answer), _plain(target)
        return Grade(plain == right, _bare(target) in answer.casefold(), plain in map(_plain, self.labels))

    def report(self) -> dict[str, Any]:
        return {"labels": self.labels}


def _bare(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


_TAGS = re.compile(r"</?[a-zA-Z][^<>]{0,100}>")
_LATEX = re.compile(r"\\(?:boxed|text(?:bf|it|tt|rm)?|math(?:bf|it|tt|rm|sf))\s*\{([^{}]*)\}")
_LINE = re.compile(r"^(?:#{1,6}|[-*+>])\s+")  # a heading, a list, a quotation
_BLOCK = re.compile(r"^```\w*\s*\n(.*?)\s*```$", re.DOTALL)
_PAIRS = {"*": "*", "_": "_", "`": "`", "~": "~", '"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“", "$": "$"}


def _plain(text: str) -> str:
    r"""A label without the markup that models put around it.

    >>> _plain("**Positive.**"), _plain(r"$\boxed{\text{positive}}$"), _plain("<b>C#</b>"), _plain("-1")
    ('positive', 'positive', 'c#', '-1')
    """
    plain, before = text, None
    while plain != before:
        before = plain
        plain = _LINE.sub("", _bare(_BLOCK.sub(r"\1", _LATEX.sub(r"\1", _TAGS.sub("", plain.strip())))))
        if len(plain) > 2 and _PAIRS.get(plain[0]) == plain[-1]:
            plain = plain[1:-1]
    return plain or _bare(text)
