"""A progress bar over the inputs of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from layertap import _arguments


@contextmanager
def progress(total: int, shown: object) -> Iterator[Callable[[], object]]:
    """Yields a function to call after each input. With `shown`, it advances a bar on standard error, or in a
    notebook.

    Raises:
        ModuleNotFoundError: a bar is wanted, and tqdm is not installed.
    """
    if not _arguments.flag("show_progress_bar", shown):
        yield _nothing
        return
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "show_progress_bar=True needs tqdm: pip install tqdm", name="tqdm"
        ) from error
    with tqdm(total=total, unit=" texts") as bar:
        yield bar.update


def _nothing() -> None:
    pass
