"""Results in files: `save` writes them, `load` reads them as a sequence."""

from __future__ import annotations

import operator
import os
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

import numpy as np

from layertap import _arguments
from layertap._results import MaybeNone, Model, Result
from layertap._types import Array, EncodeOptions, Input, IntArray
from layertap.errors import LayertapError

if TYPE_CHECKING:
    from layertap._readers import Source

_T = TypeVar("_T")

AnyPath: TypeAlias = "str | os.PathLike[str]"
# A result, one with the number of its input, or in place of a result the error of the input.
Outcome: TypeAlias = "Result | LayertapError | tuple[int, Result | LayertapError] | tuple[int, Result]"


def save(
    path: AnyPath,
    results: Iterable[Outcome],
    *,
    inputs: Sequence[Input] | None = None,
    model: Model | None = None,
) -> None:
    """Writes results to one file: .npz, .safetensors, .parquet or .jsonl, by the name of `path`.

    `results` are those of one request: a list, or what `client.stream` yields, which is written as it arrives. The
    options of the request are in the file, too. `inputs` are all inputs of the request; those of the results are
    stored. `model` is the description of the model, from `client.model()`. A `LayertapError` in place of a result
    is recorded in `failures`, except in .jsonl. `SavedResults` may be given as well, with their inputs and model.

    In .npz and .safetensors, each output of N results is one array: (N, …) if all have the same shape. If only their
    first axes differ, such as the numbers of tokens, it is (rows of all results, …), otherwise one axis with all
    numbers; then NAME.shape, (N, axes), has the shape of each.

    The file appears under its name when it is complete. If `results` raises an error, the file has the results
    before it, and the error is raised.

    Example:
        >>> layertap.save("vectors.safetensors", client.stream(texts, embeddings=True), inputs=texts)

    Raises:
        ValueError: the name ends in no known format, or the results are of several requests, or do not belong to
            `inputs`.
        TypeError: an argument has a wrong type.
        ModuleNotFoundError: .parquet needs pyarrow; the extra `parquet` has it.
        OSError: the file cannot be written.
    """
    from layertap._writers import result_file

    given: Any = None
    if isinstance(results, SavedResults):
        model = model or results.model
        if inputs is None and len(results.inputs):
            given = dict(zip(results.numbers.tolist(), results.inputs, strict=True))
    if inputs is not None:
        given = _arguments.sequence("inputs", inputs, "give a list of all inputs of the results")
    outcomes = numbered(results, given)
    with result_file(Path(path), model=model) as file:
        for number, value, outcome in outcomes:
            if isinstance(outcome, LayertapError):
                file.failed(number, str(outcome))
                continue
            file.add(number, value, outcome)


def numbered(
    results: Iterable[Outcome], given: Mapping[int, Input] | Sequence[Input] | None
) -> Iterator[tuple[int, Input | None, Result | LayertapError]]:
    """Each result, with the number of its input and the input itself. `given` are the inputs by number.

    Raises:
        TypeError: this is no iterable of results, or an input is none.
        ValueError: there is no input of a result's number, or results without numbers are not as many as inputs.
    """
    if isinstance(results, Result | LayertapError):
        raise _arguments.wrong_type("results", results, "it is one result: give a list, such as [result]")
    if isinstance(results, AsyncIterable) or not isinstance(results, Iterable):
        remedy = (
            "give a list of results, or an iterator of them; an async stream, [one async for one in stream]"
        )
        raise _arguments.wrong_type("results", results, remedy)
    if isinstance(results, SavedResults):
        return _with_inputs(results._outcomes(), given, None)
    return _with_inputs(results, given, len(results) if isinstance(results, Sized) else None)


def _with_inputs(
    results: Iterable[Outcome], given: Mapping[int, Input] | Sequence[Input] | None, num_results: int | None
) -> Iterator[tuple[int, Input | None, Result | LayertapError]]:
    from layertap._requests import input_message

    have_numbers, place = True, -1
    for place, one in enumerate(results):
        have_numbers = isinstance(one, tuple)
        number, outcome = one if isinstance(one, tuple) else (place, one)
        number = _arguments.whole_number(f"results[{place}][0]", number, 0, 1 << 62)
        if not isinstance(outcome, Result | LayertapError):
            raise _arguments.wrong_type(f"results[{place}]", outcome, "give a Result")
        if given is not None and not have_numbers and num_results is not None:
            _check_number(num_results, given)
        value = None
        if given is not None and isinstance(outcome, Result):
            if number not in (given if isinstance(given, Mapping) else range(len(given))):
                raise ValueError(f"there are {len(given)} inputs, and a result of input {number}")
            value = given[number]
            input_message(value, number)  # raises if it is no input
        yield number, value, outcome
    if given is not None and not have_numbers:
        _check_number(place + 1, given)


def _check_number(num_results: int, given: Sized) -> None:
    """Raises ValueError if results without numbers are not as many as inputs."""
    if num_results != len(given):
        raise ValueError(
            f"there are {num_results} results and {len(given)} inputs: give the inputs of these results, or each "
            "result with the number of its input, as (number, result)"
        )


def load(path: AnyPath) -> SavedResults:
    """Opens a file of `save`, or of `layertap encode` (with `--stack` for .npz and .safetensors).

    .npz and .safetensors files are mapped: their arrays are read when they are used. Of the others, only what is
    used is parsed. Nothing is unpickled, so files of others can be loaded.

    Example:
        >>> saved = layertap.load("vectors.safetensors")
        >>> vectors = saved.stacked("embeddings.0")

    Raises:
        ValueError: the file is damaged, or of another program or a newer version; the message says which, and what
            to do. What is read later raises it then.
        OSError: the file cannot be opened.
        ModuleNotFoundError: .parquet needs pyarrow; the extra `parquet` has it.
    """
    from layertap._readers import source_of

    path = Path(path)
    with path.open("rb"):
        pass  # an OSError after this one is of a damaged file
    with _reading(path):
        return SavedResults(path, source_of(path))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises ValueError, with the name of the file, for whatever a damaged file leads to."""
    from layertap._file_notes import NotReadableError

    try:
        yield
    except ModuleNotFoundError:
        raise
    except NotReadableError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from None
    except Exception as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} is damaged, or not whole; write it again. ({what})") from error


class SavedResults(Sequence[Result]):
    """The results in a file, in its order: `len`, `saved[3]`, `saved[:10]` (a list) and iteration.

    A result is made when it is taken. The arrays of .npz and .safetensors files are read-only views of the file.
    """

    def __init__(self, path: Path, source: Source) -> None:
        self._path = path
        self._source = source
        self._inputs = _Inputs(len(self), source.has_inputs, self._input)

    def __repr__(self) -> str:
        return f"SavedResults({str(self._path)!r}: {len(self)} results)"

    def __len__(self) -> int:
        return len(self._source.index)

    @overload
    def __getitem__(self, number: int) -> Result: ...
    @overload
    def __getitem__(self, number: slice) -> list[Result]: ...
    def __getitem__(self, number: int | slice) -> Result | list[Result]:
        """The result at this place in the file.

        Raises:
            IndexError: there is none.
            ValueError: the file is damaged.
        """
        found: Result | list[Result] = _item(self._result, len(self), number)
        return found

    def _result(self, place: int) -> Result:
        from layertap._readers import result_of

        with _reading(self._path):
            return result_of(self._source.parts(place), self._source.note.request)

    def _input(self, place: int) -> Input:
        with _reading(self._path):
            return self._source.input(place)

    def _outcomes(self) -> Iterator[Outcome]:
        """Each result with the number of its input, and each failure."""
        yield from zip(self.numbers.tolist(), self, strict=True)
        yield from ((number, LayertapError(message)) for number, message in self.failures.items())

    @property
    def numbers(self) -> IntArray:
        """The number of each result's input among all inputs of the request, (N,) int64."""
        return self._source.index

    @property
    def inputs(self) -> Sequence[Input]:
        """The input of each result, in their order. Empty if the file has no inputs."""
        return self._inputs

    @property
    def model(self) -> Model | MaybeNone:
        """The model of the results; None if `save` was not given it."""
        return self._source.note.model

    @property
    def options(self) -> EncodeOptions:
        """The options of the request, to use again: `client.stream(texts, **saved.options)`. What had its default
        is left out, and what is not known."""
        from layertap._request_options import options_of

        request = self._source.note.request
        return EncodeOptions() if request is None else options_of(request)

    @property
    def failures(self) -> Mapping[int, str]:
        """The errors of the inputs that failed, by their number among all inputs."""
        return self._source.note.failures

    def stacked(self, name: str) -> Array:
        """One array of an output, (N, …), by its name in `Result.arrays`, such as "embeddings.0".

        Raises:
            KeyError: the results have no such output.
            ValueError: the arrays have different shapes: see `concatenated`.
        """
        self._check(name)
        rows: Array
        with _reading(self._path):
            pieces = self._pieces(name)
            if pieces is not None:
                rows, is_stacked = pieces.rows, pieces.shapes is None
            else:
                arrays = self._arrays(name)
                is_stacked = len({array.shape for array in arrays}) == 1
                rows = np.stack(arrays) if is_stacked else arrays[0]
        if not is_stacked:
            raise ValueError(
                f"the arrays {name} have different shapes: take them from each result, or their rows, one after "
                f"another, from concatenated({name!r})"
            )
        return rows

    def concatenated(self, name: str) -> tuple[Array, IntArray]:
        """The rows of an output of all results, one after another, (R, …), and the offsets (N + 1,): those of
        result n are `rows[offsets[n] : offsets[n + 1]]`. So it has the hidden states of all tokens.

        Raises:
            KeyError: the results have no such output.
            ValueError: the arrays have no rows, or differ in more than their number.
        """
        self._check(name)
        with _reading(self._path):
            pieces = self._pieces(name)
            if pieces is None:
                arrays = self._arrays(name)
                shapes = [array.shape for array in arrays]
            elif pieces.shapes is not None:
                shapes = [tuple(shape) for shape in pieces.shapes.tolist()]
            else:
                shapes = [pieces.rows.shape[1:]] * len(self)
        if len({shape[1:] for shape in shapes}) != 1 or not shapes[0]:
            raise ValueError(f"the arrays {name} have no rows of one shape: take them from each result")
        lengths = [shape[0] for shape in shapes]
        rows = np.concatenate(arrays) if pieces is None else pieces.rows.reshape(sum(lengths), *shapes[0][1:])
        return rows, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def _check(self, name: str) -> None:
        """Raises KeyError if the results have no such output."""
        names = self[0].arrays() if len(self) else {}
        if name not in names:
            raise KeyError(f"{self._path} has no {name!r}, but {', '.join(names) or 'no results'}")

    def _pieces(self, name: str) -> Any:
        """An output as the file has it; None if it has no arrays of all results."""
        return None if self._source.pieces is None else self._source.pieces[name]

    def _arrays(self, name: str) -> list[Array]:
        return [result.arrays()[name] for result in self]


class _Inputs(Sequence[Input]):
    """The inputs in a file, each of which is parsed when it is taken."""

    def __init__(self, num_results: int, has_inputs: bool, take: Callable[[int], Input]) -> None:
        self._len = num_results if has_inputs else 0
        self._take = take

    def __len__(self) -> int:
        return self._len

    @overload
    def __getitem__(self, number: int) -> Input: ...
    @overload
    def __getitem__(self, number: slice) -> list[Input]: ...
    def __getitem__(self, number: int | slice) -> Input | list[Input]:
        found: Input | list[Input] = _item(self._take, self._len, number)
        return found

    def __repr__(self) -> str:
        return f"<{len(self)} inputs>"


def _item(take: Callable[[int], _T], length: int, number: Any) -> Any:
    """What a sequence gives for an index or a slice."""
    if isinstance(number, slice):
        return [take(place) for place in range(length)[number]]
    return take(range(length)[operator.index(number)])
