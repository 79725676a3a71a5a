"""What tests of the engine share: jobs, and ways to hold it at a step and to say how much time has passed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from edgellm_ros.core import SamplingParams
from edgellm_ros.executors.base import SequenceStep
from edgellm_ros.runtime.sequence import Job

WAIT_S = 20.0  # what is waited for comes within this time, or never


class Gate:
    """A FakeExecutor's `before_step` that holds it before each step until a permit is given."""

    def __init__(self) -> None:
        self.permits = threading.Semaphore(0)
        self.arrived = threading.Semaphore(0)
        self.opened = False

    def __call__(self, batch: Sequence[SequenceStep]) -> None:
        if not self.opened:
            self.arrived.release()
            assert self.permits.acquire(timeout=WAIT_S)

    def wait(self) -> None:
        """Return when the executor is held before a step."""
        assert self.arrived.acquire(timeout=WAIT_S)
        self.arrived.release()

    def let(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.arrived.acquire(timeout=WAIT_S)
            self.permits.release()

    def open(self) -> None:
        self.opened = True
        self.permits.release(1000)


class Valve:
    """A FakeRun's `hook` that lets a given number of events of one kind pass, and then holds the engine there."""

    def __init__(self, event: str, count: int) -> None:
        self.held, self.opened = threading.Event(), threading.Event()
        self._event, self._count = event, count

    def __call__(self, event: str) -> None:
        if event != self._event or self.opened.is_set():
            return
        if self._count == 0:
            self.held.set()
            assert self.opened.wait(WAIT_S)
        self._count -= 1


class FakeClock:
    """Takes the place of the `time` of a module: `now` only moves when a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def job(prompt: Sequence[int] | str, max_tokens: int = 8, **fields: Any) -> Job:
    """A greedy job; `fields` are those of SamplingParams and of Job."""
    ids = tuple(prompt.encode()) if isinstance(prompt, str) else tuple(prompt)
    sampling = {k: fields.pop(k) for k in list(fields) if k in SamplingParams.__dataclass_fields__}
    return Job(ids, SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **sampling}), **fields)


def until(condition: Callable[[], object]) -> None:
    """Return when `condition` holds."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)
