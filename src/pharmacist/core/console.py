"""Text from users, models, servers and files in a form that is safe to show; names of rows in messages."""

import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit


_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # control, format, lone surrogates, line and paragraph ends
_JOINERS = "\u200c\u200d"  # which Persian, Indic scripts and emoji are spelled with
_MARKDOWN = re.compile(r"([\\`*~\[\]|]|_(?![^\W_])|(?<![^\W_])_)")


def plain(text: object, *, lines: bool = False) -> str:
    r"""Escapes every character that a terminal or a page would act on instead of showing it.

    Escapes, control characters, marks that turn the direction of writing, invisible ones and lone surrogates become
    ``\x1b``, ``\u202e`` and so on; markup is for whoever prints it to leave alone, as `progress.console` does. With
    `lines` ends of lines and tabs stay, for whole messages.

    >>> plain("a\x1b[2Jb\nc"), plain("a\x1b[2Jb\nc", lines=True), plain("\u202eevil \ud800")
    ('a\\x1b[2Jb\\nc', 'a\\x1b[2Jb\nc', '\\u202eevil \\ud800')
    """
    value = str(text)
    if value.isascii() and value.isprintable():
        return value
    shown = _JOINERS + "\n\t" * lines
    acts = {one for one in set(value) - set(shown) if unicodedata.category(one) in _HIDDEN}
    return "".join(one.encode("unicode_escape").decode("ascii") if one in acts else one for one in value)


def markdown(text: object) -> str:
    r"""A text as one line of Markdown, or a cell of its tables, that shows it and does nothing else.

    >>> markdown("a|b <img src=x> *c* [d](javascript:e)\n# f")
    'a\\|b &lt;img src=x&gt; \\*c\\* \\[d\\](javascript:e)\\\\n# f'
    """
    return _MARKDOWN.sub(r"\\\1", plain(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def without_credentials(url: str) -> str:
    """An address without user, password and the values of its query, except a version.

    >>> without_credentials("https://me:secret@host:8000/v1?api-version=2&key=secret")
    'https://host:8000/v1?api-version=2&key=***'
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # no address at all, but there may be a secret in it
        return re.sub(r"//[^/]*@", "//", url.partition("?")[0])
    query = [(name, value if "version" in name.lower() else "***") for name, value in parse_qsl(parts.query)]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, urlencode(query, safe="*"), ""))


NAMED_ROWS = 10
"""Most rows that a message names."""


def named(rows: Sequence[int]) -> str:
    """Rows as a message names them, by their numbers."""
    numbers = ", ".join(map(str, rows[:NAMED_ROWS])) + (", ..." if len(rows) > NAMED_ROWS else "")
    return f"{'row' if len(rows) == 1 else 'rows'} {numbers}"


def by_reason(reasons: Mapping[str, str], count: int, form: str = "{} {}") -> str:
    """Rows as a message names them, together where they have the same reason.

    `reasons` maps names of rows (the first ones are enough) to what is wrong with them; `count` is the number of all.

    >>> by_reason({"row 1": "is empty", "row 2": "has no 'prompt'", "row 5": "is empty"}, 3)
    "row 1, row 5 is empty; row 2 has no 'prompt'"
    """
    names: dict[str, list[str]] = {}
    for name, reason in itertools.islice(reasons.items(), NAMED_ROWS):
        names.setdefault(reason, []).append(name)
    text = "; ".join(form.format(", ".join(same), reason) for reason, same in names.items())
    return text + (f" and {count - NAMED_ROWS} more" if count > NAMED_ROWS else "")
