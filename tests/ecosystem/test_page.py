"""The examples of docs/ecosystem.md print what the page says, with the default model."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ecosystem.md"
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
PACKAGES = ("langchain_core", "llama_index", "haystack", "sklearn")


@pytest.mark.long
@pytest.mark.parametrize("package", PACKAGES)
def test_the_examples_print_what_the_page_says(package: str, request: pytest.FixtureRequest) -> None:
    examples = EXAMPLE.findall(PAGE.read_text(encoding="utf-8"))
    assert len(examples) == len(PACKAGES)
    ((code, printed),) = [one for one in examples if f"from {package}" in one[0]]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: make test-ecosystem")
    code = code.replace("127.0.0.1:50051", request.getfixturevalue("real_server"))
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == printed
