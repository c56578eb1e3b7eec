"""The grader `number`."""

import math
import re
from collections.abc import Sequence

from pharmacist.evaluation.graders.base import Grade, Matching
from pharmacist.evaluation.text import STRAIGHT


_CURRENCY = r"(?:[a-z]{0,3}\\?[$€£¥₹₩]\s?)"
# A heading of Markdown is no mark: after "####" the number follows at once, and is not that of a step ("2. Answer").
_MARKER = re.compile(
    rf"the final answer is:|####(?=[\W_]{{0,20}}{_CURRENCY}?(?!\d\d?[.):](?:[^\S\n]+\S|[^\W\d]))\.?\d)"
)
_MARK = re.compile(rf"{_MARKER.pattern}|\\boxed\s*\{{")
_PUBLISHED_MARKER = "The final answer is: "
_GAP = " \u00a0\u2007\u2009\u202f"
_NUMBER = re.compile(
    # No sign after a word, a digit or a bracket; before a space and a currency also none that subtracts or lists.
    rf"(?:(?<![\w.)])(?P<sign>-)(?:(?:(?<!\d -)(?<!\n-)\s)?{_CURRENCY})?)?"
    rf"(?:(?P<grouped>\d{{1,3}}(?:(?P<mark>[,.'{_GAP}])\d{{3}}(?:(?P=mark)\d{{3}})*|(?:,\d\d){{1,6}},\d{{3}}))(?!\d)"
    r"(?P<rest>(?!(?P=mark))[.,]\d+(?![,.]?\d))?"
    r"|(?P<plain>(?:(?<!\d,)\d+,\d+(?!,\d)|\d+(?:\.\d+)?)(?:e[+-]?\d+(?!\w))?|\.\d+))"
)
_PUBLISHED_NUMBER = re.compile(r"-?\d+\.?\d*")
_SAME = STRAIGHT | str.maketrans(
    "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d\uff0c\u066c\uff0e\u066b\uff04\uffe5", "-------,,..$\u00a5"
)
_LATEX = re.compile(r"\{,\}|,\\!|\\[,;:! ]|\\thinspace\s?|~")  # what sets thousands apart


def readings(text: str) -> tuple[float, ...]:
    r"""The possible values of the final number of a solution, the likeliest first.

    >>> readings("5-3 is 2. The final answer is:  1,200 apples, not 7"), readings("9 - 5-3"), readings("none")
    ((1200.0, 1.2), (3.0,), ())
    >>> readings("1.234"), readings("1.234,5"), readings("#### 8 000"), readings(r"\boxed{8{,}000}")
    ((1.234, 1234.0), (1234.5,), (8000.0, 8.0), (8000.0,))
    """
    plain = _plain(text)
    numbers = list(_NUMBER.finditer(plain))
    if not numbers:
        return ()
    marked = [mark.end() for mark in _MARK.finditer(plain) if mark.end() <= numbers[-1].start()]
    if not marked:
        return _values(numbers[-1], first=False)
    return _values(next(number for number in numbers if number.start() >= marked[-1]), first=True)


def _plain(text: str) -> str:
    return _LATEX.sub("\u2009", text.casefold().translate(_SAME))


def _values(found: re.Match[str], *, first: bool) -> tuple[float, ...]:
    """The values of a match; if spaces may separate numbers as well as thousands, its first or last number too."""
    sign = -1.0 if found["sign"] else 1.0
    if found["plain"] is not None:
        return (sign * float(found["plain"].replace(",", ".")),)
    whole, mark, rest = found["grouped"], found["mark"] or ",", (found["rest"] or "").replace(",", ".")
    parts = whole.split(mark)
    joined = float("".join(parts) + rest)
    if rest or mark not in " ,." or len(parts) > 2 and mark != " ":
        return (sign * joined,)
    if mark == " ":
        return (sign * joined, sign * float(parts[0]) if first else float(parts[-1]))
    other = float(".".join(parts))
    if whole.startswith("0"):
        return (sign * other,)
    return (sign * other, sign * joined) if mark == "." else (sign * joined, sign * other)


def published_number(text: str) -> float:
    """The final number as published evaluations find it; infinity if there is none."""
    plain = text.replace(",", "")
    _, marker, after = plain.partition(_PUBLISHED_MARKER)
    numbers = _PUBLISHED_NUMBER.findall(after if marker else plain)
    return float(numbers[0 if marker else -1]) if numbers else math.inf


class Number(Matching):
    r"""A final number, as in GSM8K: after the last "The final answer is:", "####" or \boxed, else the last number.

    "####" counts where a number follows at once that is not the number of a heading, as in "#### 2. Answer".

    Thousands may be set apart by commas, points, spaces or apostrophes, decimals by a point or a comma; the sign may
    be any dash and stand before a currency. Where a number can be read in two ways (1.234, 8 000), it is right if one
    of the two is; a target marked by "####" has only the likeliest value. Published evaluations read a hyphen as a
    sign wherever it stands ("5-3" gives -3) and need the first marker's exact spacing; their figure is reported beside
    ours as ``published``.
    """

    version = 3
    matching = ("number", "published")

    @classmethod
    def fits(cls, targets: Sequence[str]) -> bool:
        """Whether each marks its final number as GSM8K does."""
        return all(_MARKER.search(_plain(target)) for target in targets)

    def problem(self, target: str) -> str:
        return "" if readings(target) else "has no number in its target; fix it, or use --task-type exact"

    def right(self, target: str, answer: str) -> Grade:
        gold, found = readings(target), readings(answer)
        gold = gold[:1] if "####" in target else gold
        return Grade(bool(set(gold) & set(found)), published_number(answer) == gold[0], bool(found))
