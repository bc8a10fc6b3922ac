"""Checks, before anything is loaded, for errors that would keep the server from starting."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layertap_server.config import Config

# A hub name is one word, or two with a slash between them. A path of this form that does not exist is taken
# for one.
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# The path of a Unix socket's address has 108 bytes, with the terminating zero.
MAX_SOCKET_PATH_BYTES = 107


class StartError(Exception):
    """The server cannot start; the message says why and what to do."""


def check_start(config: Config) -> None:
    """Raises a `StartError` for what would otherwise fail later in the start, or be reported by gRPC in less
    clear words."""
    check_models(config.models())
    check_address(config.host, config.port)
    if config.metrics_port:
        check_address(config.host, config.metrics_port, "--metrics-port")
    if config.unix_socket:
        check_unix_socket(config.unix_socket)


def check_models(models: Mapping[str, str]) -> None:
    """Raises a `StartError` when a model's source is a folder without a model, a file, or no possible hub
    name."""
    for source in models.values():
        folder = Path(source)
        if folder.is_dir():
            # Older folders of sentence-transformers have config.json only in a subfolder.
            if not any((folder / name).is_file() for name in ("config.json", "modules.json")):
                raise StartError(f"the folder '{source}' has no model: there is no config.json in it")
        elif folder.exists():
            raise StartError(f"'{source}' is not a folder; give the folder of the model, or a hub name")
        elif not HUB_NAME.fullmatch(source):
            raise StartError(f"there is no folder '{source}', and this is not a valid hub name")


def check_address(host: str, port: int, flag: str = "--port") -> None:
    """Raises a `StartError` when the server cannot listen on the address; `flag` is the option that sets the
    port."""
    shown = f"{f'[{host}]' if ':' in host else host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise StartError(
            f"cannot listen on {shown}: '{host}' is not an address; choose another --host"
        ) from None
    reasons = [bind_error(family, address) for family, _, _, _, address in found]
    if not all(reasons):
        return
    says = {
        errno.EADDRINUSE: f"it is in use; choose another {flag}",
        errno.EADDRNOTAVAIL: "it is not an address of this machine; choose another --host",
        errno.EACCES: f"this user has no permission; choose a {flag} of 1024 or more",
    }
    raise StartError(f"cannot listen on {shown}: {says.get(reasons[-1], os.strerror(reasons[-1]))}")


def bind_error(family: int, address: Any) -> int:
    """The errno with which binding to the address fails; 0 if it succeeds."""
    try:
        socket.create_server(address, family=family).close()
    except OSError as error:
        return error.errno or errno.EADDRNOTAVAIL
    return 0


def check_unix_socket(path: str) -> None:
    """Raises a `StartError` when no socket can be created at `path`. A socket that a stopped server has left
    behind is no error: it will be replaced."""
    folder = Path(path).parent
    why = ""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        why = f"a socket path may have up to {MAX_SOCKET_PATH_BYTES} bytes, and this one has {len(os.fsencode(path))}"
    elif not folder.is_dir():
        why = f"there is no folder '{folder}'"
    elif Path(path).exists():
        why = taken_by(path)
    elif not os.access(folder, os.W_OK | os.X_OK):
        why = f"this user has no permission to write in '{folder}'"
    if why:
        raise StartError(f"cannot listen on unix:{path}: {why}; choose another --unix-socket")


def taken_by(path: str) -> str:
    """A description of what occupies the path; empty if it is a socket on which no process listens."""
    if not stat.S_ISSOCK(Path(path).stat().st_mode):
        return "the path exists, and is not a socket"
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return ""
        except OSError as error:
            return os.strerror(error.errno or 0)
    return "another server listens there"
