"""A directory that appears under its name when it is complete: an error, an interrupt or a full disk leaves nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from edgellm_ros.errors import ToolchainError


@contextlib.contextmanager
def whole_output(output: Path) -> Iterator[Path]:
    """Gives a new directory beside `output`, which takes its place, and that of what was there, when the block ends.

    Raises ToolchainError for an OSError of the block or of the exchange.
    """
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    except OSError as error:
        raise ToolchainError(f"cannot write {output}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
