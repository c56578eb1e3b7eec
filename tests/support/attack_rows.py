"""Attack rows that several tests use."""

from tests.support.tiny import WORDS


def sentence(i: int, of: str) -> str:
    return f"{of} {WORDS[i % len(WORDS)]} {WORDS[(i // len(WORDS)) % len(WORDS)]}"


def rows(n: int, of: str) -> list[dict[str, str]]:
    return [{"prompt": sentence(i, of), "completion": f"{of} yes"} for i in range(n)]
