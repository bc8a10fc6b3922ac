"""Imports go one way: what each room may import, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLIENT = ROOT / "client" / "src" / "layertap"
SERVER = ROOT / "server" / "src" / "layertap_server"
ENGINE = SERVER / "engine"

TENSOR_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
# The modules of the server that see generated types.
EDGES = {
    f"layertap_server.api.{module}"
    for module in (
        "early_rejection",
        "embedding_validation",
        "input_validation",
        "messages",
        "parsing",
        "pipeline",
        "serialization",
        "service",
        "validation",
    )
}
# What one input asks for, and the results, as plain data.
PLANS = ("enums", "output_plans", "plan")
# The parts of the server that each package or top-level module may import, besides itself.
ALLOWED = {
    "enums": set[str](),
    "output_plans": {"enums"},
    "plan": {"enums", "output_plans"},
    "model_facts": {*PLANS},
    "config": set[str](),
    "config_sources": {"config"},
    "compiling": set[str](),
    "errors": set[str](),
    "runs_on": set[str](),
    "logs": set[str](),
    "start_checks": {"config"},
    "metrics": {"config", "start_checks"},
    "serving": {"errors", "model_facts", *PLANS, "scheduling", "tokenization"},
    "engine_host": {"config", "errors", "model_facts", *PLANS, "runs_on", "scheduling", "serving"},
    "engine_samples": {"engine_host", "metrics", "serving"},
    "local_model": {"engine_host", "model_facts", *PLANS, "scheduling", "serving", "tokenization"},
    "cli": {"app", "config", "config_sources", "processes"},
    "app": {
        "api",
        "config",
        "engine_samples",
        "local_model",
        "logs",
        "metrics",
        "model_sources",
        "rpc",
        "serving",
        "start_checks",
    },
    "model_sources": {"config", "model_loading", "serving"},
    "model_loading": {
        "config",
        "engine",
        "engine_host",
        "local_model",
        "model_facts",
        "start_checks",
        "tokenization",
    },
    "rpc": {"config", "errors", "runs_on"},
    "api": {
        "config",
        "errors",
        "metrics",
        "model_facts",
        *PLANS,
        "rpc",
        "scheduling",
        "serving",
        "tokenization",
    },
    "link": {
        "api",
        "engine_host",
        "errors",
        "model_facts",
        *PLANS,
        "scheduling",
        "serving",
        "tokenization",
    },
    "processes": {
        "api",
        "app",
        "config",
        "engine",
        "engine_samples",
        "link",
        "local_model",
        "logs",
        "metrics",
        "model_facts",
        "model_loading",
        "model_sources",
        "rpc",
        "serving",
        "start_checks",
        "tokenization",
    },
    "tokenization": {"compiling", "model_facts", *PLANS},
    "scheduling": {"model_facts", *PLANS, "runs_on"},
    "engine": {"compiling", "model_facts", *PLANS},
}
# The public types of the client.
CLIENT_FACE = {
    "layertap",
    "layertap._types",
    "layertap.cli",
    "layertap._commands",
    "layertap._files",
    "layertap._model_inputs",
    "layertap._tables",
    "layertap.errors",
    "layertap.haystack",
    "layertap.langchain",
    "layertap.llama_index",
    "layertap.remote_model",
    "layertap.sklearn",
}
# Packages and modules of the server without gRPC and protobuf.
PLAIN = (
    "scheduling",
    "tokenization",
    "engine",
    *PLANS,
    "model_facts",
    "config",
    "config_sources",
    "api.budget",
    "api.planning",
    "api.streaming",
)


def modules() -> dict[str, Path]:
    """Our own modules by name; what is generated is left out."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for package in (CLIENT, SERVER)
        for path in sorted(package.rglob("*.py"))
        if package / "v1" not in path.parents
    }


MODULES = modules()


def names_of(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """What the nodes import, as `package.module.name`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(path: Path) -> Iterator[str]:
    """Wherever in the module, in functions too."""
    return names_of(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imported_at_once(path: Path) -> Iterator[str]:
    """When the module is imported itself."""
    return names_of(ast.parse(path.read_text(encoding="utf-8")).body)


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def importers(*packages: str) -> set[str]:
    """Our modules that import any of the packages."""
    return {name for name, path in MODULES.items() if any(under(one, *packages) for one in imported(path))}


def test_the_modules_are_found() -> None:
    assert {
        "layertap",
        "layertap.cli",
        "layertap_server.app",
        "layertap_server.engine.taps",
    } <= MODULES.keys()
    assert "torch" in set(imported(ENGINE / "taps.py"))


def test_the_client_never_imports_the_server_nor_the_server_the_client() -> None:
    for name, path in MODULES.items():
        for one in imported(path):
            if under(name, "layertap"):
                assert not under(one, "layertap_server"), f"{name} imports {one}"
            elif under(one, "layertap"):
                assert under(one, "layertap.v1"), f"{name} imports {one}"


def test_only_the_engine_imports_torch() -> None:
    outside = {name for name in MODULES if not under(name, "layertap_server.engine")}
    # The client returns torch tensors to callers who want them, bertviz takes them, and it imports torch only then.
    of_client = {"layertap._padding", "layertap._torch", "layertap._pictures.to_bertviz"}
    assert importers("torch") & outside == of_client
    for name in of_client:
        assert not {one.split(".")[0] for one in imported_at_once(MODULES[name])} & {"torch"}
    # The tokenizer is from transformers.
    assert importers("transformers", "tokenizers") & outside == {
        "layertap_server.tokenization.tokenizer_loading"
    }


@pytest.mark.parametrize(
    ("library", "module"),
    [
        ("langchain_core", "langchain"),
        ("llama_index", "llama_index"),
        ("haystack", "haystack"),
        ("sklearn", "sklearn"),
    ],
)
def test_each_library_is_known_to_its_module_alone(library: str, module: str) -> None:
    assert importers(library) == {f"layertap.{module}"}
    assert importers(f"layertap.{module}") == set()


def test_generated_types_stay_at_the_edges() -> None:
    seeing = importers("layertap.v1")
    assert {name for name in seeing if under(name, "layertap_server")} == EDGES
    assert not seeing & CLIENT_FACE
    assert not any(under(name, "layertap._pictures") for name in seeing)


@pytest.mark.parametrize("package", PLAIN)
def test_the_inner_packages_know_no_grpc_and_no_protobuf(package: str) -> None:
    found = {name: path for name, path in MODULES.items() if under(name, f"layertap_server.{package}")}
    assert found
    for name, path in found.items():
        foreign = [one for one in imported(path) if under(one, "grpc", "google", "layertap")]
        assert foreign == [], name


def part_of(name: str) -> str:
    """The package of the server in which a module or a name lies, or its module beside the packages."""
    return name.removeprefix("layertap_server").lstrip(".").partition(".")[0]


def test_imports_go_one_way() -> None:
    for name, path in MODULES.items():
        if not under(name, "layertap_server") or name == "layertap_server":
            continue
        ours = {part_of(one) for one in imported(path) if under(one, "layertap_server")}
        assert ours - {part_of(name)} <= ALLOWED[part_of(name)], name


def test_the_packages_form_no_circle() -> None:
    left = dict(ALLOWED)
    while left:
        free = {name for name, uses in left.items() if not uses & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: uses for name, uses in left.items() if name not in free}


@pytest.mark.parametrize(
    ("statement", "light"),
    [
        ("import layertap", True),
        ("import layertap_server.config", True),
        ("import layertap_server.cli", True),
        ("import layertap_server.scheduling.scheduler", True),
        ("import safetensors", False),
    ],
)
def test_what_an_import_loads(statement: str, light: bool) -> None:
    script = f"{statement}\nimport sys\nprint([name for name in {TENSOR_LIBRARIES!r} if name in sys.modules])"
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT
    )
    assert (ran.stdout.strip() == "[]") == light, ran.stdout
