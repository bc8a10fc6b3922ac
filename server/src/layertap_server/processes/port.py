"""Reserves the port that the fronts share, so that no other server can share it by accident."""

from __future__ import annotations

import socket

from layertap_server.start_checks import StartError


class ReservedPort:
    """Holds a port without listening on it. Fronts of this user can listen with SO_REUSEPORT, and get all
    connections; a server without that option is refused the port.

    Two servers that both set the option would share a port unnoticed. So the port is first bound without it.
    """

    def __init__(self, host: str, port: int) -> None:
        """`port` 0 reserves a free one. Raises `StartError`."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError):
            raise StartError(
                f"cannot listen on {host}: it is not an address; choose another --host"
            ) from None
        self._held: list[socket.socket] = []
        self.port = port
        errors: list[OSError] = []
        for family, _, _, _, address in dict.fromkeys(found):
            error = self._hold(family, (address[0], self.port, *address[2:]))
            errors += () if error is None else (error,)
        if not self._held:
            raise StartError(
                f"cannot listen on {host}:{port}: {errors[-1].strerror}; choose another --host or --port"
            )

    def _hold(self, family: int, address: tuple[object, ...]) -> OSError | None:
        """Returns why it cannot: this machine may have no addresses of the family."""
        try:
            self._bind(family, address)
        except OSError as error:
            return error
        return None

    def _bind(self, family: int, address: tuple[object, ...]) -> None:
        with socket.create_server(address, family=family) as probe:
            self.port = probe.getsockname()[1]
        held = socket.socket(family)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            held.bind((address[0], self.port, *address[2:]))
        except OSError:
            held.close()
            raise
        self._held.append(held)

    def release(self) -> None:
        for held in self._held:
            held.close()
