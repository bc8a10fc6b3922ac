"""The control channel between the supervisor and each of its processes: JSON messages, some with descriptors.

A Unix socket that keeps message boundaries. Its end tells each side that the other process is gone.
"""

from __future__ import annotations

import array
import asyncio
import json
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

logger = logging.getLogger(__name__)

# Larger than any message here: the settings, or the samples of the metrics.
MAX_MESSAGE_BYTES = 2**18
MAX_DESCRIPTORS = 4

Message = dict[str, Any]


def socket_pair() -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_MESSAGE_BYTES)
    return ends


class Control:
    """One end of a control channel. Used on the event loop only."""

    def __init__(
        self,
        end: socket.socket,
        on_message: Callable[[Message, list[int]], None],
        on_end: Callable[[], None],
    ) -> None:
        """`on_message` gets each message with its descriptors, which it owns. `on_end` is called once, when
        the other process is gone."""
        self._socket = end
        self._on_message, self._on_end = on_message, on_end
        self._loop = asyncio.get_running_loop()
        end.setblocking(False)
        self._loop.add_reader(end.fileno(), self._receive)
        self.is_open = True

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> bool:
        """Sends a message, with copies of the descriptors. Returns whether it was sent: it is not if the
        other process is gone, or has not read for so long that the channel is full."""
        if not self.is_open:
            return False
        data = json.dumps(message).encode()
        rights = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        )
        try:
            self._socket.sendmsg([data], rights)
        except OSError as error:
            logger.debug("a control message was not sent: %s", error)
            return False
        return True

    def _receive(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE_BYTES, MAX_DESCRIPTORS)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self.close()
            self._on_end()
            return
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        self._on_message(json.loads(data), descriptors)

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
