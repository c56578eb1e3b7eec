"""What can be said of an answer without any judge."""

import re
from itertools import groupby


_WORD = re.compile(r"[^\W\d_]+")


def is_empty(text: str) -> bool:
    """Whether an answer holds no letter and no digit.

    >>> is_empty(" ...!"), is_empty("42")
    (True, False)
    """
    return not any(character.isalnum() for character in text)


def is_repetitive(text: str) -> bool:
    """Whether some word stands more than three times in a row (letters only, case ignored), as HS+ of Booster has it.

    >>> is_repetitive("No, no, no!"), is_repetitive("no, No, no: no")
    (False, True)
    """
    words = _WORD.findall(text.casefold())
    return any(sum(1 for _ in run) > 3 for _, run in groupby(words))


def is_degenerate(text: str) -> bool:
    """Whether an answer is empty or repetitive: neither a refusal nor help, though it harms nobody."""
    return is_empty(text) or is_repetitive(text)


def word_count(text: str) -> int:
    """Runs of letters or digits.

    >>> word_count("Sci/Tech"), word_count("glad.")
    (2, 1)
    """
    return len(re.findall(r"\w+", text))
