"""The connections of a client to its server, and the choice of one for each call. Shared by both clients."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from threading import Lock
from typing import Any

import grpc

from layertap._transport import stub_of
from layertap.v1 import encoder_pb2 as pb

# Another connection is opened when every open one has this many calls.
BUSY_CALLS = 16
# The most connections that are opened on the server's advice.
MAX_ADVISED = 8
# The time limit of the call that asks for the server's advice; after it, the server is asked again.
ASK_S = 60.0

_num_calls = attrgetter("num_calls")


class Connection:
    """One channel of grpc or grpc.aio to the server. `num_calls` counts its open calls and streams."""

    __slots__ = ("channel", "num_calls", "stub")

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.stub = stub_of(channel)
        self.num_calls = 0


class Connections:
    """The open connections of one client. Each call goes to the one with the fewest open calls.

    A server may consist of several processes that listen on one port. A connection belongs to one of them,
    so a busy client needs several connections to use them all. The first is opened by the first call, and
    another one whenever every open one has BUSY_CALLS calls: up to `at_most`, or, if that is None, as many as
    the server advises, and no more than MAX_ADVISED. `ask` asks the server for its advice without waiting,
    and passes the answer to `learn`. It is called when a second connection would be opened and the advice is
    not known.

    Thread-safe. The lock guards the list of connections and their `num_calls`; `limit` is the number that may
    be open now.
    """

    def __init__(
        self,
        owner: str,
        open_channel: Callable[[], Any],
        at_most: int | None,
        ask: Callable[[Connections, Connection], object],
    ) -> None:
        self._owner = owner
        self._open_channel = open_channel
        self._follows_advice = at_most is None
        self._ask = ask
        # The server is not asked before this time of the monotonic clock; never, once its advice is known.
        self._ask_at_s = 0.0 if at_most is None else math.inf
        self._asking: object = None  # what `ask` returned: the event loop itself does not keep a task alive
        self._lock = Lock()
        self._open: list[Connection] = []
        self.is_closed = False
        self.limit = at_most or 1

    def take(self, without: Sequence[Connection] = ()) -> Connection:
        """The connection for a call that begins now: the one with the fewest calls, and none of `without` if
        there is another. Call `release` when the call has ended.

        Raises:
            RuntimeError: the client is closed.
        """
        asks = False
        with self._lock:
            self.check_open()
            usable = [one for one in self._open if one not in without] if without else self._open
            # One is the usual number, for which `min` takes several times as long.
            chosen = usable[0] if len(usable) == 1 else min(usable, key=_num_calls, default=None)
            if chosen is None or chosen.num_calls >= BUSY_CALLS:
                if len(self._open) < self.limit:
                    chosen = Connection(self._open_channel())
                    self._open.append(chosen)
                elif time.monotonic() >= self._ask_at_s:
                    self._ask_at_s = time.monotonic() + ASK_S
                    asks = True
            if chosen is None:
                chosen = min(self._open, key=_num_calls)
            chosen.num_calls += 1
        if asks:
            self._asking = self._ask(self, chosen)
        return chosen

    def release(self, connection: Connection) -> None:
        with self._lock:
            connection.num_calls -= 1

    def may_repeat(self, error: grpc.RpcError) -> bool:
        """Whether a call that failed with this error may succeed on another open connection.

        This is so if the connection was lost, for example because the process that it belonged to died. An
        UNAVAILABLE that the server itself sent has metadata.
        """
        is_lost = error.code() is grpc.StatusCode.UNAVAILABLE and not error.trailing_metadata()
        return is_lost and len(self._open) > 1

    def learn(self, models: Iterable[pb.Model]) -> None:
        """Follows the server's advice in the descriptions of its models. A connection that is open stays."""
        if self._follows_advice:
            self._ask_at_s = math.inf
            self.limit = min(max([1, *(model.connections for model in models)]), MAX_ADVISED)

    def check_open(self) -> None:
        """Raises RuntimeError if the client is closed."""
        if self.is_closed:
            raise RuntimeError(f"this {self._owner} is closed: make another")

    def close(self) -> list[Any]:
        """Returns the channels, for the caller to close. No connection is opened after this."""
        with self._lock:
            self.is_closed = True
            channels = [connection.channel for connection in self._open]
            self._open = []
        return channels
