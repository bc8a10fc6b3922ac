"""Where the methods of a class run on several threads, each says on which (`layertap_server/runs_on.py`)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = Path(__file__).parent.parent / "server" / "src" / "layertap_server"
MARKS = ("on_grpc_thread", "on_event_loop", "on_engine_thread", "on_any_thread")
# The classes whose methods run on several threads.
SHARED = {"Call", "RpcServer", "LoopBridge", "Requests", "Scheduler", "EngineHost"}

Method = ast.FunctionDef | ast.AsyncFunctionDef


def names(method: Method) -> list[str]:
    return [one.id for one in method.decorator_list if isinstance(one, ast.Name)]


def mark(method: Method) -> str | None:
    found = [name for name in names(method) if name in MARKS]
    assert len(found) <= 1, method.name
    return found[0] if found else None


def classes() -> Iterator[tuple[str, dict[str, Method]]]:
    for path in sorted(SERVER.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                methods = [
                    one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)
                ]
                yield node.name, {one.name: one for one in methods}


MARKED = {name: methods for name, methods in classes() if any(mark(one) for one in methods.values())}


def test_classes_of_several_threads_are_marked() -> None:
    assert MARKED.keys() >= SHARED


@pytest.mark.parametrize("name", MARKED)
def test_each_method_says_on_which_thread_it_runs(name: str) -> None:
    for method in MARKED[name].values():
        is_special = method.name.startswith("__") or "property" in names(method)
        assert is_special or mark(method), f"{name}.{method.name}"


@pytest.mark.parametrize("name", MARKED)
def test_no_method_calls_one_of_another_thread(name: str) -> None:
    """Passing it as a callback is what it is for."""
    methods = MARKED[name]
    for method in methods.values():
        own = mark(method)
        for node in ast.walk(method):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "self"
                and (called := methods.get(node.func.attr)) is not None
                and own is not None
            ):
                allowed = (own, "on_any_thread", None)
                assert mark(called) in allowed, f"{name}.{method.name} ({own}) calls {called.name}"
