"""Compiles native code once on the machine that runs it, and keeps the library in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

# Further compiler flags, after all others.
FLAGS_VARIABLE = "LAYERTAP_CFLAGS"
# `cc --version` is killed after this time.
VERSION_TIMEOUT_S = 30


class CompileError(Exception):
    """The library could not be built, or cannot be used; the message says why."""


class NoCompilerError(CompileError):
    """There is no C compiler on this machine."""


def compile_once(
    source: Path,
    compile_flags: Sequence[str],
    link_flags: Sequence[str] = (),
    *,
    sources: Sequence[Path] = (),
) -> Path:
    """The shared library of `source`, which may include `sources`; it is compiled if it is not in the cache
    yet.

    The flags in the environment variable `LAYERTAP_CFLAGS` are added to those for compiling.
    Compiling and linking are two steps, so that the linker can leave out what the compiler driver would add.
    Raises `CompileError`.
    """
    compiler = compiler_command()
    steps = (*compile_flags, "-fPIC", "-c", *further_flags()), (*link_flags, "-shared")
    try:
        texts = [path.read_text(encoding="utf-8") for path in (source, *sources)]
        parts = (*texts, *compiler, version_of(compiler), *steps[0], "", *steps[1], processor())
        identity = "\n".join(parts)
        name = f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
        library = cache_folder() / name
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                compiled, linked = Path(folder, "compiled.o"), Path(folder, name)
                for flags, read, written in ((steps[0], source, compiled), (steps[1], compiled, linked)):
                    command = [*compiler, *flags, str(read), "-o", str(written)]
                    subprocess.run(command, check=True, capture_output=True, text=True)
                linked.replace(library)  # atomic: another process may build the same library
    except subprocess.CalledProcessError as error:
        raise CompileError(error.stderr.strip()) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder for the cache
        raise CompileError(str(error)) from error
    return library


def compiler_command() -> list[str]:
    """The C compiler, with its first arguments if `CC` has some. Raises `NoCompilerError`."""
    compiler = os.environ.get("CC", "").split()
    if compiler:
        if shutil.which(compiler[0]) is None:
            raise NoCompilerError(f"CC is {compiler[0]}, which is not a program")
        return compiler
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found is not None:
            return [found]
    raise NoCompilerError("cc, gcc and clang are not in PATH")


@lru_cache(maxsize=1)
def warn_of_no_compiler() -> None:
    """Logs once per process what a missing compiler costs, however many libraries cannot be compiled."""
    logger.warning(
        "no C compiler found (CC, cc, gcc or clang): without the native code for attention, attention maps, "
        "linear layers, pooling, BERT's layers, embeddings and tokenizer, the server is slower, most of all "
        "for short texts; using torch's kernels and the model's own tokenizer"
    )


def further_flags() -> list[str]:
    """Raises `CompileError`."""
    try:
        return shlex.split(os.environ.get(FLAGS_VARIABLE, ""))
    except ValueError as error:
        raise CompileError(f"{FLAGS_VARIABLE}: {error}") from error


def version_of(compiler: Sequence[str]) -> str:
    """The first line of `cc --version`. Raises `CompileError`."""
    command = [*compiler, "--version"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=VERSION_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f"cannot find out the compiler's version: {error}") from error
    return done.stdout.partition("\n")[0]


def check_structures(
    library: ctypes.CDLL, structures: Mapping[str, type[ctypes.Structure] | np.dtype[Any]]
) -> None:
    """Raises `CompileError` if a structure, by its name in C, has another size in the library's
    `layertap_sizeof` than in Python."""
    size_of = library.layertap_sizeof
    size_of.argtypes, size_of.restype = (ctypes.c_char_p,), ctypes.c_int64
    for name, structure in structures.items():
        size = structure.itemsize if isinstance(structure, np.dtype) else ctypes.sizeof(structure)
        compiled = size_of(name.encode())
        if compiled != size:
            raise CompileError(f"the structure {name} has {compiled} bytes in C, and {size} in Python")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layertap"


def processor() -> str:
    """A description of the processor, on which `-march=native` depends: machines with other processors may
    read the same cache on a shared disk."""
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            for line in cpuinfo:
                if line.startswith(("flags", "Features")):
                    return line
    return platform.processor() or platform.machine()
