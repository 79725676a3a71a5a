"""When the deltas of running requests go out: the first at once, later ones gathered, the end at once.

One thread serves every request. The engine's thread passes on what comes up to the first text itself, for on a busy
machine a thread that is woken waits for a core; after that it only wakes the streamer, and not at all while a gathering
period runs, so streaming costs the engine next to nothing.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from edgellm_ros.core import Delta, FinishReason, Phase, Usage
from edgellm_ros.runtime.generation import Generation

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """What is new of one request; `completion_tokens` counts from its start."""

    phase: Phase
    text: str
    reasoning: str
    queue_position: int
    completion_tokens: int


@dataclass(frozen=True)
class Outcome:
    """How one request ended: the whole answer, or the part of it that there is."""

    text: str = ""
    reasoning: str = ""
    reason: FinishReason = FinishReason.ERROR
    usage: Usage = field(default_factory=Usage)
    error: Exception | None = None


class Stream:
    """One request on its way. `on_batch` and `on_end` are called once each at a time, never after `on_end`."""

    def __init__(self, streamer: Streamer, on_batch: Callable[[Batch], None] | None, on_end: Callable[[Outcome], None]):
        """Known to `streamer` from now on, until it ends."""
        self._streamer, self._on_batch, self._on_end = streamer, on_batch, on_end
        self._generation: Generation | None = None
        self._cancelled = False
        self._cancel_error: Exception | None = None
        self._texts: list[str] = []
        self._reasonings: list[str] = []
        self._num_tokens = 0
        self._decoding = False
        self.quiet = False  # the streamer looks by itself at next_time; only the end needs to wake it
        self.next_time = 0.0
        self.ended = False
        self._lock = threading.Lock()  # held while something is passed on
        streamer.add(self)

    def notify(self) -> None:
        """A delta is there; called on the engine's thread."""
        if not self._decoding and self._generation is not None:
            self._streamer.pump(self)
        elif not self.quiet or (self._generation is not None and self._generation.done):
            self._streamer.wake(self)

    def attach(self, generation: Generation) -> None:
        """The engine accepted the request."""
        self._generation = generation
        if self._cancelled:
            generation.cancel()
        self._streamer.wake(self)

    def cancel(self, error: Exception | None = None) -> None:
        """End the request at its next token; `error` says why when it was not its caller who asked."""
        self._cancel_error = error
        self._cancelled = True
        if self._generation is not None:
            self._generation.cancel()

    def fail(self, error: Exception) -> None:
        """The engine did not accept the request."""
        self._finish(Outcome(error=error))

    def pump(self, now: float, period_s: float) -> None:
        """Pass on what there is, if it is time."""
        with self._lock:
            self._pump(now, period_s)

    def _pump(self, now: float, period_s: float) -> None:
        generation = self._generation
        if self.ended or generation is None:
            return
        if self._decoding and now < self.next_time and not generation.done:
            self._rest()
            return
        self.quiet = False  # before draining: what comes after it wakes the streamer again
        deltas = generation.drain()
        if not deltas:
            return
        batch = self._gather(deltas)
        if self._on_batch is not None and (batch.text or batch.reasoning or not self._decoding):
            self._on_batch(batch)
        last = deltas[-1]
        if last.phase is Phase.DONE:
            self._finish(self._outcome(last))
        elif batch.text or batch.reasoning:
            self._decoding = True
            self.next_time = now + period_s
            self._rest()

    def _rest(self) -> None:
        self.quiet = True
        self._streamer.wake_at(self.next_time, self)

    def _gather(self, deltas: list[Delta]) -> Batch:
        text = "".join(delta.text for delta in deltas)
        reasoning = "".join(delta.reasoning for delta in deltas)
        self._texts.append(text)
        self._reasonings.append(reasoning)
        self._num_tokens += sum(len(delta.token_ids) for delta in deltas)
        return Batch(deltas[-1].phase, text, reasoning, deltas[-1].queue_position, self._num_tokens)

    def _outcome(self, last: Delta) -> Outcome:
        reason = last.finish_reason or FinishReason.ERROR
        error = last.error
        if reason is FinishReason.CANCELLED and error is None:
            error = self._cancel_error
        return Outcome("".join(self._texts), "".join(self._reasonings), reason, last.usage or Usage(), error)

    def _finish(self, outcome: Outcome) -> None:
        self.ended = True
        self._generation = None
        try:
            self._on_end(outcome)
        finally:
            self._streamer.remove(self)


class Streamer:
    """The thread that pumps all streams; `period_s` is asked anew for each batch."""

    def __init__(self, period_s: Callable[[], float]) -> None:
        """Start the thread."""
        self._period_s = period_s
        self._woken: queue.SimpleQueue[Stream | None] = queue.SimpleQueue()
        self._due: list[tuple[float, int, Stream]] = []  # a heap, of the thread alone
        self._order = itertools.count()
        self._idle = threading.Condition()
        self._active: set[Stream] = set()
        self._thread = threading.Thread(target=self._run, name="edgellm-streamer", daemon=True)
        self._thread.start()

    def add(self, stream: Stream) -> None:
        """Count a stream as active."""
        with self._idle:
            self._active.add(stream)

    def remove(self, stream: Stream) -> None:
        """A stream has ended."""
        with self._idle:
            self._active.discard(stream)
            self._idle.notify_all()

    def wake(self, stream: Stream) -> None:
        """Look at a stream soon; from any thread."""
        self._woken.put(stream)

    def wake_at(self, when: float, stream: Stream) -> None:
        """Look at a stream at a time of time.monotonic(); from any thread."""
        if threading.current_thread() is self._thread:
            heapq.heappush(self._due, (when, next(self._order), stream))
        else:
            self.wake(stream)  # its thread will find that it is not time yet

    def pump(self, stream: Stream) -> None:
        """Pass on what there is of a stream; one that cannot be passed on is cancelled."""
        try:
            stream.pump(time.monotonic(), self._period_s())
        except Exception:
            _log.exception("a stream could not be passed on")
            stream.cancel()

    def cancel_all(self, error: Exception) -> None:
        """Cancel every active stream, `error` being the reason."""
        with self._idle:
            streams = list(self._active)
        for stream in streams:
            stream.cancel(error)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no stream is active; False when `timeout_s` passed first."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._active, timeout_s)

    def close(self) -> None:
        """Stop the thread; streams that are still active stay unfinished."""
        self._woken.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            for stream in self._next():
                if stream is None:
                    return
                self.pump(stream)

    def _next(self) -> list[Stream | None]:
        """Wait for a wake or the next due time, and return what to pump."""
        timeout = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
        found: list[Stream | None] = []
        try:
            found.append(self._woken.get(timeout=timeout))
        except queue.Empty:
            pass
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            found.append(heapq.heappop(self._due)[2])
        return found
