"""What checkpoints made of a text, kept in a directory: the next bundle of the same original is compared sooner.

A file is named by the hash of all that decides what is in it, so that it is never out of date, and may be deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from edgellm_ros import __version__
from edgellm_ros.errors import ToolchainError
from edgellm_ros.toolchain.reference import FloatArray
from edgellm_ros.toolchain.whole_output import why_not_writable

_BLOCK = 1 << 20


def check_cache(directory: Path) -> None:
    """Raise ToolchainError for a place where nothing can be kept."""
    if why := why_not_writable(directory):
        raise _not_kept(directory, why)


class KeptStates:
    """Hidden states after the last layer (tokens, width) in fp32, of all passages one after the other."""

    def __init__(self, directory: Path, files: Iterable[Path], parts: Iterable[bytes]) -> None:
        """files: the checkpoint's, which are read whole; parts: what else decides the states."""
        digest = hashlib.sha256(f"edgellm {__version__} hidden states".encode())
        for path in files:
            digest.update(_hash_of(path))
        for part in parts:
            digest.update(hashlib.sha256(part).digest())
        self.path = directory / f"{digest.hexdigest()}.npy"

    def load(self, lengths: Sequence[int], width: int) -> list[FloatArray] | None:
        """(length, width) of every passage; None where nothing whole is kept."""
        try:
            states = np.load(self.path)
        except (OSError, ValueError, EOFError):
            return None
        if states.dtype != np.float32 or states.shape != (sum(lengths), width):
            return None
        return np.split(states, np.cumsum(lengths)[:-1])

    def save(self, states: Sequence[FloatArray]) -> None:
        """Write them whole or not at all; raises ToolchainError where that is not possible."""
        partial = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                np.save(file, np.concatenate(states))
            partial.replace(self.path)
        except OSError as error:
            raise _not_kept(self.path.parent, error) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _not_kept(directory: Path, why: object) -> ToolchainError:
    return ToolchainError(f"cannot keep the original's states in {directory}: {why}; give another --cache, or none")


def _hash_of(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.digest()
