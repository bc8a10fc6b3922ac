"""The Python code of the pages passes mypy and pyright in strict mode, as it is copied from the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CLIENT = ROOT / "client" / "src"
# grpc has no types of its own; those who use it with type checkers install types-grpcio. Those of
# matplotlib and of pandas are not complete. The libraries of docs/ecosystem.md are in an environment of their own
# (tests/ecosystem).
UNTYPED = re.compile(
    r"^import grpc$|^import torch$|\.savefig\(|to_pandas\(|^from (?:langchain_core|llama_index|haystack|sklearn)\b",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = []
    for page in PAGES:
        blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        for number, code in enumerate(blocks):
            if UNTYPED.search(code) is None:
                path = folder / f"{page.stem}_{number}.py"
                path.write_text(code, encoding="utf-8")
                found.append(path)
    assert len(found) > 15
    return found


def test_mypy(scripts: list[Path]) -> None:
    config = scripts[0].with_name("mypy.ini")
    follow = "[mypy-{}.*]\nfollow_imports = silent\nignore_missing_imports = true\n"
    config.write_text(
        f"[mypy]\nstrict = true\nmypy_path = {CLIENT}\n"
        + "".join(map(follow.format, ("layertap", "grpc", "google")))
    )
    command = [sys.executable, "-m", "mypy", "--config-file", config, "--scripts-are-modules", *scripts]
    # The module names differ, so that all are checked in one run.
    checked = subprocess.run(command, capture_output=True, text=True, check=False, cwd=config.parent)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def pyright() -> str | None:
    beside = Path(sys.executable).with_name("pyright")
    return str(beside) if beside.exists() else shutil.which("pyright")


@pytest.mark.skipif(pyright() is None, reason="pyright is not installed: pip install pyright")
def test_pyright(scripts: list[Path]) -> None:
    folder = scripts[0].parent
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(CLIENT)], "include": ["*.py"]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [str(pyright()), "--project", str(folder), "--pythonpath", sys.executable, "--outputjson"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert checked.stdout, checked.stderr
    report = json.loads(checked.stdout)
    assert report["summary"]["filesAnalyzed"] >= len(scripts)
    errors = [
        f"{Path(one['file']).name}:{one['range']['start']['line'] + 1}: {one['message']}"
        for one in report["generalDiagnostics"]
        if one["severity"] == "error"
    ]
    assert errors == []
