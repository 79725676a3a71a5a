"""Work for the executor that is no generation: callers wait while the engine's thread does it between two steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from edgellm_ros.errors import DeviceError, EdgeLLMError


class Errands:
    """A list of them; whoever owns it guards `add` and `take` with a lock."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Callable[[], None], Future[None]]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, work: Callable[[], None]) -> Future[None]:
        """Note `work`; the future has its end, or its error."""
        done: Future[None] = Future()
        self._waiting.append((work, done))
        return done

    def take(self) -> list[tuple[Callable[[], None], Future[None]]]:
        """Everything that waits, which is then the caller's to do or to refuse."""
        taken, self._waiting = self._waiting, []
        return taken

    def put_back(self, errands: list[tuple[Callable[[], None], Future[None]]]) -> None:
        """Let those that were taken and could not be done wait again, before all others."""
        self._waiting = errands + self._waiting


def do(work: Callable[[], None], done: Future[None]) -> None:
    """Do an errand. What is wrong with it goes to its caller alone; a failure of the device is raised, `done` waits."""
    try:
        work()
    except DeviceError:
        raise
    except EdgeLLMError as error:
        done.set_exception(error)
    else:
        done.set_result(None)
