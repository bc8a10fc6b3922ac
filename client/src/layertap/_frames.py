"""Results and tokens as pandas data frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layertap import _arguments
from layertap._results import Quantized, Result, Tokens
from layertap._saved import Outcome, SavedResults, numbered
from layertap._types import Input, Pair, TokenIds, Words

if TYPE_CHECKING:
    from pandas import DataFrame


def _pandas() -> Any:
    try:
        import pandas
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise
        raise ImportError("data frames need pandas: pip install 'layertap[pandas]'", name="pandas") from error
    return pandas


def to_pandas(
    results: Iterable[Outcome], inputs: Sequence[Input] | None = None, *, expand: bool = False
) -> DataFrame:
    """A pandas data frame with a row for each result. The index is the number of its input.

    `results` and `inputs` are as in `save`; results of `load` have their inputs with them. The columns:

    - of the inputs, if there are any: `text`, `pair` (two texts), `ids` or `words`, of the kinds that occur
    - `token_count` and `truncated_tokens`
    - each output by its name, such as `last_hidden_state` or `embeddings.0`: an array in each cell. int8 vectors
      are given as float32. With `expand`, an output that is a vector of the same length in each result has a
      column for each of its numbers, `embeddings.0.0`, `embeddings.0.1`, …
    - `tokens`: the tokens as strings, if the results have them
    - `error`, if inputs have failed: the message; the other cells are empty

    Raises:
        ImportError: pandas is not installed; the extra `pandas` has it.
        TypeError, ValueError: as `save`.
    """
    pandas = _pandas()
    if inputs is None and isinstance(results, SavedResults) and len(results.inputs):
        given: Any = dict(zip(results.numbers.tolist(), results.inputs, strict=True))
    else:
        given = None if inputs is None else _arguments.sequence("inputs", inputs, "give a list of all inputs")
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    for number, value, outcome in numbered(results, given):
        row = {} if value is None else _input_cells(value)
        row |= _cells(outcome) if isinstance(outcome, Result) else {"error": str(outcome)}
        rows.append(row)
        numbers.append(number)
    names = dict.fromkeys(name for row in rows for name in row)
    if "error" in names:
        del names["error"]
        names["error"] = None
    columns: dict[str, Any] = {}
    for name in names:
        cells = [row.get(name) for row in rows]
        if expand and _are_vectors(cells):
            columns |= {f"{name}.{place}": one for place, one in enumerate(np.stack(cells).T)}  # type: ignore[arg-type]
        elif any(isinstance(cell, np.ndarray | tuple) for cell in cells):
            columns[name] = pandas.Series(cells, dtype=object)
        else:
            columns[name] = cells
    frame: DataFrame = pandas.DataFrame(columns, index=range(len(rows)))
    frame.index = pandas.Index(numbers, name="index", dtype="int64")
    return frame


def _input_cells(value: Input) -> dict[str, Any]:
    match value:
        case Pair():
            return {"pair": (value.first, value.second)}
        case TokenIds():
            return {"ids": np.asarray(value.ids)}
        case Words():
            return {"words": tuple(value.words)}
    return {"text": value}


def _cells(result: Result) -> dict[str, Any]:
    cells: dict[str, Any] = {
        "token_count": result.token_count,
        "truncated_tokens": result.truncated_tokens,
    }
    arrays = result.arrays().items()
    cells |= {name: array for name, array in arrays if not name.startswith(("tokens.", "embeddings."))}
    for place, vector in enumerate(result.embeddings):
        cells[f"embeddings.{place}"] = vector.dequantize() if isinstance(vector, Quantized) else vector
    if result.tokens is not None:
        cells["tokens"] = result.tokens.tokens
    return cells


def _are_vectors(cells: Sequence[Any]) -> bool:
    shapes = {cell.shape if isinstance(cell, np.ndarray) else None for cell in cells}
    shape = shapes.pop() if len(shapes) == 1 else None
    return shape is not None and len(shape) == 1


def tokens_to_pandas(tokens: Tokens) -> DataFrame:
    """As `Tokens.to_pandas`."""
    frame: DataFrame = _pandas().DataFrame(
        {
            "token": list(tokens.tokens),
            "id": tokens.ids,
            "type_id": tokens.type_ids,
            "start": tokens.starts,
            "end": tokens.ends,
            "special": tokens.special,
            "word_id": tokens.word_ids,
            "sequence_id": tokens.sequence_ids,
        }
    )
    return frame
