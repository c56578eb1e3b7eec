"""Words of all scripts, those without spaces between words among them, as regular expressions."""

DENSE = (
    r"\u2e80-\u2fff\u3005-\u3007\u3021-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff"
)
"""Letters of scripts without spaces whose words have about two letters (Han, kana), for a character class."""
LOOSE = r"\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aad\ua9e0-\ua9ff\uaa60-\uaa7f"
"""Letters of scripts without spaces whose words have about four letters (Thai, Lao, Tibetan, Burmese, Khmer)."""
SPACED = rf"[^\W{DENSE}{LOOSE}]"
"""A letter, digit or underscore of a script whose words have spaces between them."""
WORD = rf"{SPACED}+|[{DENSE}{LOOSE}]"
"""A word, or a letter of a script without spaces."""
TOKEN = rf"{WORD}|[^\w\s]+"
"""A word, a letter of a script without spaces, or a run of punctuation."""
WORD_AND_SPACE = rf"[{DENSE}]{{1,2}}|[{LOOSE}]{{1,4}}|[^\s{DENSE}{LOOSE}]+\s*|\s+"
"""A word with what follows up to the next one; joined, all of a text."""
