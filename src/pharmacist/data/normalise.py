"""Normal forms of texts: without invisible characters, and for prompts with equal case and white space."""

import re
import unicodedata

import xxhash


# Unicode's Default_Ignorable_Code_Point (zero-width, bidi and tag characters, fillers, variation selectors), the other
# format and control characters, noncharacters, and the Braille blank; white space is not among them.
_HIDDEN = (
    "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufdd0-\ufdef\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_INVISIBLE, _SEEN = re.compile(f"[{_HIDDEN}]"), re.compile(rf"[^\s{_HIDDEN}]")


def visible(text: str) -> str:
    r"""A text without invisible characters, for comparisons; models read the text itself.

    >>> visible("b\u200bread\ufeff")
    'bread'
    """
    return _INVISIBLE.sub("", text)


def is_blank(text: str) -> bool:
    """Whether a text has no visible character."""
    return _SEEN.search(text) is None


def normalised_prompt(text: str) -> str:
    r"""A prompt as overlap checks see it: without invisible characters, and with compatible characters, case, white
    space and final punctuation made equal.

    >>> normalised_prompt("  How do I\n b\u200bake BREAD?")
    'how do i bake bread'
    """
    text = visible(text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = " ".join(text.casefold().split())
    return text.rstrip(" .?!…\"'") or text


def text_key(text: str) -> int:
    """64-bit hash of a text."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def prompt_key(text: str) -> int:
    """64-bit hash of a prompt's normalised text."""
    return text_key(normalised_prompt(text))
