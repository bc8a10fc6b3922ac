"""The inputs of a command: their sources, and the errors of those that failed."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from typing import IO, Any

from layertap._types import Input, Pair, TokenIds, Words
from layertap.errors import LayertapError

# A text that the client refuses: it stands for a line that is no input, whose problem is known here.
_REFUSED = "\udcff"
# An object as JSON in one line, without spaces.
json_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_FIELDS = ("text", "pair", "ids", "words")


class Texts:
    """Texts from the command line, or the lines of a file; can be iterated over once.

    With `pair_separator`, a text is a pair: what is before the first separator, and what is after it. With
    `json_lines`, each line is an object with `text`, `pair`, `ids` or `words`; with `only_text`, only with `text`.

    With `stops`, the iteration ends after a text has failed. A line that is no input is yielded as a text that
    the client rejects; its error message then says what is wrong with the line.
    """

    def __init__(
        self,
        texts: Iterable[str],
        source: IO[bytes] | None,
        *,
        stops: bool,
        pair_separator: str = "",
        json_lines: bool = False,
        only_text: bool = False,
    ) -> None:
        self.stops = stops
        self.failures: dict[int, str] = {}
        self.total = len(list(texts)) if source is None else _num_lines(source)
        self._texts = texts
        self._source = source
        self._pair_separator = pair_separator
        self._json_lines = json_lines
        self._only_text = only_text
        self.problems: dict[int, str] = {}  # what is wrong with a line, by its number
        self.given: dict[int, Input] = {}  # the inputs that are not finished

    def __iter__(self) -> Iterator[Input]:
        for index, text in enumerate(self._lines(self._source) if self._source is not None else self._texts):
            if self.stops and self.failures:
                return
            self.given[index] = value = self._input(index, text)
            yield value

    def _lines(self, source: IO[bytes]) -> Iterator[str]:
        for index, line in enumerate(source):
            line = line.rstrip(b"\r\n")
            if index == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                self.problems[index] = (
                    f"byte {error.start} of the line, 0x{line[error.start]:02x}, is not UTF-8"
                )
                yield line.decode(errors="surrogateescape")

    def _input(self, index: int, text: str) -> Input:
        if index in self.problems:
            return text
        try:
            if self._json_lines:
                found = from_json(text)
                if self._only_text and not isinstance(found, str):
                    raise ValueError('the line has no text: give an object such as {"text": "…"}')
                return found
            if not self._pair_separator:
                return text
            first, found, second = text.partition(self._pair_separator)
            if not found:
                raise ValueError(f"there is no separator {self._pair_separator!r} between two texts")
            return Pair(first, second)
        except ValueError as error:
            self.problems[index] = str(error)
            return _REFUSED

    def take(self, index: int) -> Input:
        """The input of this number, which is finished now."""
        return self.given.pop(index)

    def failed(self, index: int, error: LayertapError) -> None:
        """Records the error of a text."""
        self.given.pop(index, None)
        self.failures[index] = self.located(index, self.problems.get(index, str(error)))

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


def _num_lines(source: IO[bytes]) -> int | None:
    """The number of lines of a file, for the time that is left; None for a pipe."""
    try:
        if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
            return None
        start, lines, last = source.tell(), 0, b"\n"
        while block := source.read(1 << 20):
            lines, last = lines + block.count(b"\n"), block[-1:]
        source.seek(start)
    except OSError:
        return None
    return lines + (last != b"\n")


def from_json(line: str | bytes) -> Input:
    """The input of a line of JSON.

    Raises:
        ValueError: the line is not an object with one input.
    """
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not JSON: {error}") from None
    wanted = 'give an object such as {"text": "…"}, {"pair": ["…", "…"]}, {"ids": […]} or {"words": […]}'
    names = [name for name in _FIELDS if isinstance(found, dict) and name in found]
    if len(names) != 1:
        raise ValueError(f"the line has {len(names)} of the fields text, pair, ids and words: {wanted}")
    (name,) = names
    value = found[name]
    if name == "text" and isinstance(value, str):
        return value
    if name == "ids" and _is_list(value, int):
        type_ids = found.get("type_ids")
        if type_ids is not None and not _is_list(type_ids, int):
            raise ValueError('type_ids has a wrong type: give {"ids": […], "type_ids": […]}')
        return TokenIds(value, type_ids)
    if name in ("words", "pair") and _is_list(value, str):
        if name == "words":
            return Words(value)
        if len(value) == 2:
            return Pair(*value)
    raise ValueError(f"{name} has a wrong type: {wanted}")


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


def as_json(value: Input) -> dict[str, Any]:
    """An input as the fields that `Texts` reads from a line of JSON."""
    match value:
        case Pair():
            return {"pair": [value.first, value.second]}
        case TokenIds():
            ids = {"ids": [int(one) for one in value.ids]}
            return (
                ids if value.type_ids is None else {**ids, "type_ids": [int(one) for one in value.type_ids]}
            )
        case Words():
            return {"words": list(value.words)}
    return {"text": value}
