"""What `import layertap` gives, and what it must not need."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import layertap


def test_all_is_what_there_is() -> None:
    public = {
        name
        for name, value in vars(layertap).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(layertap.__all__) == public
    assert len(layertap.__all__) == len(public)


def test_everything_public_is_documented() -> None:
    for name in layertap.__all__:
        value = getattr(layertap, name)
        assert value.__doc__, name
        for member, method in vars(value).items():
            if not member.startswith("_") and callable(method):
                assert method.__doc__, f"{name}.{member}"


def test_the_sdk_needs_neither_torch_nor_the_extras() -> None:
    code = """
import sys
banned = ("torch", "transformers", "tokenizers", "safetensors", "click", "rich", "matplotlib", "bertviz")
banned += ("IPython", "layertap_server", "langchain_core", "llama_index", "haystack", "sklearn", "pydantic")
banned += ("pandas", "pyarrow")
for name in banned:
    sys.modules[name] = None  # importing it raises
import layertap
from layertap import *
import layertap.remote_model, layertap.cli
assert "grpc" in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
