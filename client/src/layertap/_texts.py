"""The texts of a command: where each comes from, and which of them failed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import IO

from layertap.errors import LayertapError


class Texts:
    """Texts from the command line, or the lines of a file, to be iterated over once.

    `stops`: no more texts are given once one has failed. Which lines are no UTF-8 is kept, for the text
    that is given for one is no Unicode either, and is refused.
    """

    def __init__(self, texts: Iterable[str], source: IO[bytes] | None, *, stops: bool) -> None:
        self.stops = stops
        self.failures: dict[int, str] = {}
        self.total = None if source is not None else len(list(texts))
        self._texts = texts
        self._source = source
        self._not_utf8: dict[int, str] = {}

    def __iter__(self) -> Iterator[str]:
        for text in self._lines(self._source) if self._source is not None else self._texts:
            if self.stops and self.failures:
                return
            yield text

    def _lines(self, source: IO[bytes]) -> Iterator[str]:
        for index, line in enumerate(source):
            line = line.rstrip(b"\r\n")
            if index == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors begin files with
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                self._not_utf8[index] = (
                    f"byte {error.start} of the line, 0x{line[error.start]:02x}, is not UTF-8"
                )
                yield line.decode(errors="surrogateescape")

    def failed(self, index: int, error: LayertapError) -> None:
        """Notes the error of a text."""
        text = self._not_utf8.get(index, str(error))
        if self._source is not None:
            name = getattr(self._source, "name", "<stdin>")
            name = "standard input" if name in ("-", "<stdin>", 0) else name
            text = f"{name}:{index + 1}: {text}"
        self.failures[index] = text

    def failure_text(self, index: int) -> str:
        """What is wrong with a text that failed, and its place: its file and line, or its number."""
        return self.failures[index]
