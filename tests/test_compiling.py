"""The cache of compiled libraries: what a library's name depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from layertap_server import compiling
from layertap_server.compiling import CompileError, NoCompilerError, compile_once

Fake = Callable[[str], None]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "empty.c"
    path.write_text("")
    return path


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Writes a fake compiler: a shell script that answers `--version` with the given command."""
    path = tmp_path / "fake-cc"
    monkeypatch.setenv("CC", str(path))

    def write(version: str) -> None:
        # A compile step writes the file that its last argument names.
        path.write_text(f"""#!/bin/sh
if [ "$1" = --version ]; then {version}; exit; fi
for last in "$@"; do :; done
echo compiled > "$last"
echo "$@" >> {tmp_path}/commands
""")
        path.chmod(0o755)

    return write


def test_another_version_of_the_compiler_compiles_anew(source: Path, compiler: Fake) -> None:
    compiler("echo fake 1.0")
    first = compile_once(source, ())
    assert first.exists()
    assert compile_once(source, ()) == first
    compiler("echo fake 1.1")
    assert compile_once(source, ()) != first


def test_flags_of_the_environment_come_last(
    source: Path, compiler: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler("echo fake 1.0")
    plain = compile_once(source, ("-O1",))
    monkeypatch.setenv("LAYERTAP_CFLAGS", "-O3 '-DNAME=a b'")
    assert compile_once(source, ("-O1",)) != plain
    [compiling, _] = (tmp_path / "commands").read_text().splitlines()[-2:]
    assert compiling.startswith(f"-O1 -fPIC -c -O3 -DNAME=a b {source} -o ")
    monkeypatch.setenv("LAYERTAP_CFLAGS", "'-O3")
    with pytest.raises(CompileError, match="LAYERTAP_CFLAGS: No closing quotation"):
        compile_once(source, ("-O1",))


def test_only_the_first_line_of_the_version_counts(source: Path, compiler: Fake) -> None:
    compiler("echo fake 1.0; echo built on Monday")
    first = compile_once(source, ())
    compiler("echo fake 1.0; echo built on Tuesday")
    assert compile_once(source, ()) == first


@pytest.mark.parametrize("version", ["exit 3", "exec sleep 60"])
def test_a_compiler_without_a_version(
    version: str, source: Path, compiler: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "VERSION_TIMEOUT_S", 0.2 if "sleep" in version else 30)
    compiler(version)
    with pytest.raises(CompileError, match="the compiler's version") as raised:
        compile_once(source, ())
    assert not isinstance(raised.value, NoCompilerError)


def test_no_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nonexistent/cc -pipe")
    with pytest.raises(NoCompilerError, match="CC is /nonexistent/cc"):
        compile_once(source, ())
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(NoCompilerError, match="not in PATH"):
        compile_once(source, ())
