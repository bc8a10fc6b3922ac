"""The texts of a command: their sources, and the errors of those that failed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import IO

from layertap.errors import LayertapError


class Texts:
    """Texts from the command line, or the lines of a file; can be iterated over once.

    With `stops`, the iteration ends after a text has failed. A line that is not UTF-8 is yielded as a text
    that the client rejects; its error message then says which byte of the line is wrong.
    """

    def __init__(self, texts: Iterable[str], source: IO[bytes] | None, *, stops: bool) -> None:
        self.stops = stops
        self.failures: dict[int, str] = {}
        self.total = None if source is not None else len(list(texts))
        self._texts = texts
        self._source = source
        self.not_utf8: dict[int, str] = {}  # what is wrong with a line, by its number

    def __iter__(self) -> Iterator[str]:
        for text in self._lines(self._source) if self._source is not None else self._texts:
            if self.stops and self.failures:
                return
            yield text

    def _lines(self, source: IO[bytes]) -> Iterator[str]:
        for index, line in enumerate(source):
            line = line.rstrip(b"\r\n")
            if index == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                self.not_utf8[index] = (
                    f"byte {error.start} of the line, 0x{line[error.start]:02x}, is not UTF-8"
                )
                yield line.decode(errors="surrogateescape")

    def failed(self, index: int, error: LayertapError) -> None:
        """Records the error of a text."""
        self.failures[index] = self.located(index, self.not_utf8.get(index, str(error)))

    def located(self, index: int, text: str) -> str:
        """What is wrong with a text, after its file and line if it has one."""
        if self._source is not None:
            name = getattr(self._source, "name", "<stdin>")
            name = "standard input" if name in ("-", "<stdin>", 0) else name
            text = f"{name}:{index + 1}: {text}"
        return text

    def failure_text(self, index: int) -> str:
        """The error of a text that failed, with its file and line, or its number."""
        return self.failures[index]
