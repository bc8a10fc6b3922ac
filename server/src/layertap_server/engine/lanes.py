"""The engine on the cores of a CPU: each takes texts of its own through the whole model.

Threads that share a pass meet after each of its steps, some forty times, and wait each time for the
one whose core has something else to do: the event loop, mostly. So a batch is parted into as many
groups as there are cores, each of which is a pass of one thread. None waits for another before its
end, and not there either: the next batch is launched as soon as a core has nothing left to do.
Only what cannot be parted evenly, as a text alone, is run by all of them together.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TypeAlias

import torch

from layertap_server.engine.engine import Engine
from layertap_server.engine.memory import within_memory
from layertap_server.engine.model import LoadedModel
from layertap_server.engine.threads import use_one_thread
from layertap_server.plan import Outputs, Work

# Tokens of the largest group, in fair shares: beyond it the other cores would wait too long.
MAX_SHARE = 1.25
# Tokens for each core from which on texts are taken apart, as long as nobody has measured: each core reads all
# the weights then, which small batches wait for.
MIN_TOKENS = 128

Answers = list[tuple[int, Outputs]]
Job = Callable[[], Answers]
# None ends a lane.
Jobs: TypeAlias = "SimpleQueue[tuple[Job, Future[Answers]] | None]"


class LaneEngine(Engine):
    """An engine of several cores, each of which runs by itself."""

    def __init__(self, loaded: LoadedModel, num_lanes: int) -> None:
        super().__init__(loaded)
        self._lanes = Lanes(num_lanes)
        # Of a batch whose texts the cores take apart from each other, at least.
        self.min_tokens: float = num_lanes * MIN_TOKENS

    def run(self, works: Sequence[Work]) -> list[Outputs]:
        launched = self.launch(works)
        if launched is not None:
            return launched.wait()
        answers: list[Outputs] = super().run(works)
        return answers

    def launch(self, works: Sequence[Work]) -> LanesPending | None:
        """Gives each core its part of a batch and returns at once; None for a batch that had better be run by
        all of them together, when they have nothing else to do.

        Raises `MemoryError` where memory is short, as `LanesPending.wait` does.
        """
        if sum(work.num_tokens for work in works) < self.min_tokens:
            return None
        groups = even_groups([work.num_tokens for work in works], self._lanes.num)
        return None if groups is None else self._launch_groups(works, groups)

    def wait_for_room(self) -> None:
        """Returns when a core has nothing left to do."""
        self._lanes.wait_for_room()

    def _launch_groups(self, works: Sequence[Work], groups: Sequence[Sequence[int]]) -> LanesPending:
        self._loaded.memory.check(works, packed=True, free=self._free_bytes)
        return LanesPending([self._lanes.submit(partial(self._run_group, works, group)) for group in groups])

    @torch.inference_mode()
    def _run_group(self, works: Sequence[Work], group: Sequence[int]) -> Answers:
        return within_memory(self._loaded.device, lambda: list(self._launch_pass(works, group).wait()))


def even_groups(sizes: Sequence[int], num_groups: int) -> list[list[int]] | None:
    """Indices of items in groups of about equal size, each item to the smallest so far, the largest items
    first; None where one would be larger than `MAX_SHARE` of a fair one."""
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    totals = [0] * num_groups
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        smallest = totals.index(min(totals))
        groups[smallest].append(index)
        totals[smallest] += sizes[index]
    return groups if max(totals) * num_groups <= MAX_SHARE * sum(sizes) else None


@dataclass(frozen=True, slots=True)
class LanesPending:
    """A batch whose groups the cores have been given."""

    groups: list[Future[Answers]]

    def wait(self) -> list[Outputs]:
        """Its answers, in its order; or what the first of its groups that failed has run into."""
        wait(self.groups)
        answers = dict(answer for group in self.groups for answer in group.result())
        return [answers[index] for index in range(len(answers))]


class Lanes:
    """Threads that each compute alone, with torch's operations too; jobs begin in the order given.

    They are no `ThreadPoolExecutor`, whose threads the interpreter waits for when it ends: one that
    hangs in a pass would keep the process.
    """

    def __init__(self, num: int) -> None:
        self.num = num
        self._jobs: Jobs = SimpleQueue()
        self._open = OpenJobs()
        ready = threading.Barrier(num + 1)
        for number in range(num):
            threading.Thread(
                target=serve, args=(self._jobs, self._open, ready), name=f"lane {number}", daemon=True
            ).start()
        ready.wait()
        # A thread ends with the engine, which it does not hold.
        weakref.finalize(self, end, self._jobs, num).atexit = False

    def submit(self, job: Job) -> Future[Answers]:
        future: Future[Answers] = Future()
        self._open.add(1)
        self._jobs.put((job, future))
        return future

    def wait_for_room(self) -> None:
        self._open.wait_below(self.num)


def end(jobs: Jobs, num: int) -> None:
    for _ in range(num):
        jobs.put(None)


class OpenJobs:
    """How many jobs are not done yet."""

    def __init__(self) -> None:
        self._num = 0
        self._changed = threading.Condition()

    def add(self, num: int) -> None:
        with self._changed:
            self._num += num
            self._changed.notify_all()

    def wait_below(self, num: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._num < num)


def serve(jobs: Jobs, open_jobs: OpenJobs, ready: threading.Barrier) -> None:
    """The life of a lane."""
    use_one_thread()
    ready.wait()
    while (given := jobs.get()) is not None:
        job, future = given
        try:
            answers = job()
        except BaseException as error:
            open_jobs.add(-1)
            future.set_exception(error)
        else:
            open_jobs.add(-1)
            future.set_result(answers)
            del answers
        del given, job, future  # what it held is not kept until the next one comes
