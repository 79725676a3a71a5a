"""What a caller holds of a running request: its deltas as they come, its result, and the way to cancel it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator

from edgellm_ros.core import Completion, Delta, Phase

_log = logging.getLogger(__name__)


class Channel:
    """The link between the engine, which puts deltas in, and a Generation, which takes them out.

    The engine holds this and not the Generation, so an abandoned Generation is noticed.
    """

    def __init__(self, notify: Callable[[], object] | None = None) -> None:
        """`notify` is called on the engine's thread after every delta; it must be quick."""
        self.deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self.cancelled = False
        self.done = threading.Event()
        self.completion: Completion | None = None
        self.error: Exception | None = None
        self._notify = notify

    def put(self, delta: Delta) -> None:
        """Hand a delta to the caller."""
        self.deltas.put(delta)
        if self._notify is not None:
            try:
                self._notify()
            except Exception:
                _log.exception("the notify callback of a generation failed; it is not called again")
                self._notify = None

    def finish(self, last: Delta, completion: Completion) -> None:
        """Hand over the last delta and the whole answer."""
        self.completion, self.error = completion, last.error
        self.done.set()
        self.put(last)
        self._notify = None


class Generation:
    """One submitted request. Iterating gives its deltas as they come; dropping it cancels the request.

    The deltas are QUEUED (again whenever the place in the queue changes), PREFILL, DECODE (one for each token; its
    text may be empty while a character or a possible stop text is incomplete), and in the end DONE with finish_reason,
    usage and the last text. All methods may be called from any thread; a delta is given to one reader only.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._ended = False

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        if self._ended:
            raise StopIteration
        return self._taken(self._channel.deltas.get())

    def drain(self) -> list[Delta]:
        """The deltas that are there now, without waiting."""
        found = []
        while not self._ended:
            try:
                found.append(self._taken(self._channel.deltas.get_nowait()))
            except queue.Empty:
                break
        return found

    def result(self, timeout_s: float | None = None) -> Completion:
        """Wait for the end and return the whole answer, whether or not the deltas were read.

        Raises the error with which the request ended, and TimeoutError (the request goes on) after `timeout_s`.
        """
        if not self._channel.done.wait(timeout_s):
            raise TimeoutError(f"the generation has not ended within {timeout_s} s")
        if self._channel.error is not None:
            raise self._channel.error
        assert self._channel.completion is not None
        return self._channel.completion

    def cancel(self) -> None:
        """End the request at its next token, with FinishReason.CANCELLED; once is enough, more does no harm."""
        self._channel.cancelled = True

    @property
    def done(self) -> bool:
        """Whether the request has ended (its deltas may still be unread)."""
        return self._channel.done.is_set()

    def __del__(self) -> None:
        self._channel.cancelled = True

    def _taken(self, delta: Delta) -> Delta:
        if delta.phase is Phase.DONE:
            self._ended = True
        return delta
