"""A directory that appears under its name when it is complete: an error, an interrupt or a full disk leaves nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from edgellm_ros.errors import ToolchainError


@contextlib.contextmanager
def whole_output(output: Path) -> Iterator[Path]:
    """Gives a new directory beside `output`, which takes its place, and that of what was there, when the block ends.

    What was there is moved aside whole before it is deleted, so that nothing half deleted has the name either.
    Raises ToolchainError for an OSError of the block or of the exchange.
    """
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
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
        raise ToolchainError(f"cannot write {output}: {error}{remedy}") from error
    finally:
        for directory in (partial, replaced):
            shutil.rmtree(directory, ignore_errors=True)
