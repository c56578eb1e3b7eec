"""A file that is one JSON array, whose elements are parsed one at a time out of a sliding window of the text."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from pharmacist.core.errors import DataError
from pharmacist.data.formats.base import MAX_ROW_BYTES, Row
from pharmacist.data.formats.json_text import DECODER, Refused, as_row, check_depth, why_no_json
from pharmacist.data.formats.text import TOO_LONG, TextFile


CHUNK = 1 << 20
"""Bytes that are read at a time."""
_SPACE = re.compile(r"[ \t\n\r]*")


class JsonArray(TextFile):
    """The elements of one JSON array."""

    # ijson is five times as fast (0.2 s for 100 000 rows), but gives neither the text of an element, which is copied
    # unchanged, nor the line of an error, and keeps one of two keys of the same name.

    format = "json"

    def split(self, file: BinaryIO) -> Iterator[Row]:
        text = _Window(file, self.where)
        if text.peek() != "[":
            raise DataError(f"{self.where}: holds no JSON array")
        text.take(1)
        number, follows = 0, text.peek()
        if follows == "]":
            text.take(1)
        while follows != "]":
            text.peek()
            line = text.line
            value, raw = text.element()
            yield Row(number, line, *as_row(value), raw.encode("utf-8"))
            follows = text.peek()
            if follows not in {",", "]"}:
                found = f"'{follows}'" if follows else "the end of the file"
                raise DataError(
                    f"{self.where}: line {text.line} is not valid JSON (',' or ']' expected after row {number}, "
                    f"{found} found); fix the file"
                )
            text.take(1)
            number += 1
        if text.peek():
            raise DataError(f"{self.where}: line {text.line} has text after the end of the JSON array; delete it")

    def join(self, rows: Iterable[bytes]) -> Iterator[bytes]:
        yield b"["
        for position, raw in enumerate(rows):
            yield (b",\n" if position else b"\n") + raw
        yield b"\n]\n"


class _Window:
    """The unread part of a text, as much of it as is needed."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self._where = file, where
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended = "", 0, False
        self._left = 0  # characters before the window in its first line
        self.line = 1

    def _more(self) -> bool:
        """Reads on; False at the end."""
        if self._ended:
            return False
        # The window doubles, so that a long element is parsed a few times only.
        data = self._file.read(max(CHUNK, len(self._text) - self._at))
        self._ended = not data
        try:
            new = self._decode.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self._at) + error.object[: error.start].count(b"\n")
            raise DataError(f"{self._where}: is not UTF-8 near line {line}; save it as UTF-8") from error
        if self._ended:  # the window stays, for positions in it
            return False
        gone = self._text[: self._at]
        self._left = len(gone) - gone.rfind("\n") - 1 + (0 if "\n" in gone else self._left)
        self._text, self._at = self._text[self._at :] + new, 0
        return True

    def take(self, count: int) -> str:
        taken = self._text[self._at : self._at + count]
        self.line += taken.count("\n")
        self._at += count
        return taken

    def peek(self) -> str:
        """The next character that is no white space, which is skipped; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self.take(match.end() - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def element(self) -> tuple[Any, str]:
        """Parses and takes one JSON value; gives it and its text."""
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
                check_depth(value, self._text[self._at : end])
            except (ValueError, RecursionError) as error:
                too_long = len(self._text) - self._at > MAX_ROW_BYTES
                if not too_long and not isinstance(error, Refused | RecursionError) and self._more():
                    continue
                line = self.line
                if isinstance(error, json.JSONDecodeError):
                    line += self._text.count("\n", self._at, error.pos)
                    error.colno += 0 if "\n" in self._text[: error.pos] else self._left
                reason = TOO_LONG if too_long and "Unterminated" in str(error) else why_no_json(error)
                raise DataError(f"{self._where}: line {line} {reason}; fix the file") from error
            # A number at the very end of the window may go on in the next chunk.
            if end == len(self._text) and not isinstance(value, dict | list | str) and self._more():
                continue
            if end - self._at > MAX_ROW_BYTES:
                raise DataError(f"{self._where}: the row at line {self.line} {TOO_LONG}; shorten or delete it")
            return value, self.take(end - self._at)
