"""The examples of the outputs' page, which expect models of several kinds, run against the fake server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "outputs.md"
ADDRESS = "127.0.0.1:50051"
SCRIPTS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
SIZES = {"H": 4, "2 H": 8}  # the fake's


def test_every_output_has_an_example() -> None:
    code = "".join(SCRIPTS)
    for word in (
        *(
            "last_hidden_state_positions",
            "HiddenStates",
            "pairs=",
            "key_positions",
            'pooling="none"',
            'pooling=["',
        ),
        *("exclude_special_tokens", '"word"', "Logits(", "positions=", "top_k", "activation", "sparse=True"),
        *("contacts=True", "rerank(", "prompt="),
    ):
        assert word in code


ENCODERS = re.findall(
    r"^```python\n(.*?)^```$",
    (DOCS / "vectors.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize("code", [*SCRIPTS, *ENCODERS], ids=range(len(SCRIPTS) + len(ENCODERS)))
def test_examples_run(address: str, code: str) -> None:
    assert ADDRESS in code
    command = [sys.executable, "-W", "error", "-c", code.replace(ADDRESS, address)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    printed = ended.stdout.splitlines()
    assert printed
    shapes = [found[1] for line in code.splitlines() if (found := re.search(r"# (\([\w, ]+\))", line))]
    for line, shape in zip(printed, shapes, strict=False):
        for name in sorted(SIZES, key=len, reverse=True):
            shape = re.sub(rf"\b{name}\b", str(SIZES[name]), shape)
        assert line.replace(",)", ")") == shape
