"""A directory that appears under its name when it is complete: an error, a signal or a full disk leaves nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from edgellm_ros.errors import ToolchainError


@contextlib.contextmanager
def whole_output(output: Path, *inputs: Path) -> Iterator[Path]:
    """Gives a new directory beside `output`, which takes its place, and that of what was there, when the block ends.

    What was there is moved aside whole before it is deleted, so that nothing half deleted has the name either. Of a
    link the directory that it points to is replaced. Raises ToolchainError for a name such as `.`, for one of `inputs`
    in the directory, since they would be deleted with it, and for an OSError of the block or of the exchange.
    """
    if output.name in ("", ".."):
        raise ToolchainError(f"{output} is not a name of its own; name the directory, from outside of it")
    for path in (path.resolve() for path in inputs):
        if output.resolve() in (path, *path.parents):
            raise ToolchainError(
                f"{output} would be replaced, and {path}, which is read, with it; choose another directory"
            )
    shown, output = output, output.resolve() if output.is_symlink() else output
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        with _terminated_as_interrupted():
            yield partial
        if output.exists():
            output.rename(replaced)
        try:
            partial.rename(output)
        except BaseException:
            if replaced.exists():
                replaced.rename(output)
            raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; make room there, or choose another directory: nothing of it was kept" if full else ""
        raise ToolchainError(f"cannot write {shown}: {error}{remedy}") from error
    finally:
        for directory in (partial, replaced):
            shutil.rmtree(directory, ignore_errors=True)


def why_not_writable(directory: Path) -> str:
    """Why no file can be written into `directory`, which may still have to be made; empty when one can."""
    place = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not place.is_dir():
        return f"{place} is not a directory"
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return f"{place}: {error.strerror}"


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, from `timeout` or a shutdown, ends the block as Ctrl-C does: what is half written is removed."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """What the system says to safetensors' writer, such as a full disk, becomes an OSError again."""
    import safetensors

    try:
        yield
    except safetensors.SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error
