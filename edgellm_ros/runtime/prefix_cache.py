"""Where the first tokens of a prompt can be taken from instead of computing them: a slot, or pinned host memory."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgellm_ros.executors.base import Executor
from edgellm_ros.runtime.kv_cache import MIN_REUSE, ROW_ALIGN, SlotTable, Tokens, common_prefix, reusable_length

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PinnedPrefix:
    """A prefix's tokens, and its keys and values as `Executor.save_prefix` gave them."""

    tokens: Tokens
    data: npt.NDArray[np.uint8]
    adapter: str = ""  # fingerprint of the LoRA adapter that computed it


class PinnedStore:
    """Pinned prefixes in host memory, the least recently used dropped first; also on disk where a directory is given.

    `key` says for what the data is valid (the bundle's hash, executor); files of another key are left alone.
    """

    def __init__(self, max_tokens: int, directory: Path | None = None, key: str = "") -> None:
        """Read what `directory` holds for `key`; a file that cannot be read is reported in the log and not used."""
        self._max_tokens = max_tokens
        self._directory = directory
        self._key = hashlib.sha256(key.encode()).hexdigest()[:16]
        self._entries: OrderedDict[tuple[str, bytes], PinnedPrefix] = OrderedDict()
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            for path in sorted(directory.glob(f"{self._key}-*.npz"), key=lambda p: p.stat().st_mtime):
                self._read(path)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_tokens(self) -> int:
        """Tokens pinned, of at most max_tokens."""
        return sum(len(entry.tokens) for entry in self._entries.values())

    def fits(self, tokens: Tokens) -> bool:
        """Whether these tokens can be pinned at all."""
        return 0 < len(tokens) <= self._max_tokens

    def touch(self, tokens: Tokens, adapter: str = "") -> bool:
        """Whether exactly these tokens are pinned; they count as just used then."""
        name = adapter, tokens.tobytes()
        if name not in self._entries:
            return False
        self._entries.move_to_end(name)
        return True

    def add(self, tokens: Tokens, data: npt.NDArray[np.uint8], adapter: str = "") -> None:
        """Pin a prefix that fits, and drop the least recently used ones that no longer fit beside it."""
        assert self.fits(tokens)
        entry = PinnedPrefix(tokens.copy(), data, adapter)
        self._entries[adapter, entry.tokens.tobytes()] = entry
        self._evict()
        if self._directory is not None:
            self._write(entry)

    def find(self, prompt: Tokens, adapter: str = "") -> tuple[PinnedPrefix | None, int]:
        """The pinned prefix of this adapter that shares most tokens with `prompt`, and how many."""
        best, length = None, 0
        for entry in self._entries.values():
            if entry.adapter != adapter:
                continue
            shared = common_prefix(entry.tokens, prompt)
            if shared > length:
                best, length = entry, shared
        return best, length

    def _evict(self) -> None:
        while self.num_tokens > self._max_tokens:
            _, dropped = self._entries.popitem(last=False)
            if self._directory is not None:
                self._remove(self._path(dropped.tokens, dropped.adapter))

    def _path(self, tokens: Tokens, adapter: str) -> Path:
        assert self._directory is not None
        name = hashlib.sha256(adapter.encode() + tokens.tobytes()).hexdigest()[:32]
        return self._directory / f"{self._key}-{name}.npz"

    def _write(self, entry: PinnedPrefix) -> None:
        path = self._path(entry.tokens, entry.adapter)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with open(partial, "wb") as file:
                np.savez(file, tokens=entry.tokens, data=entry.data, adapter=np.array(entry.adapter))
            os.replace(partial, path)
        except OSError as error:
            with suppress(OSError):  # where it cannot be written it often cannot be removed, and is not there
                partial.unlink()
            _log.warning("the pinned prefix was not saved to %s: %s", path, error)

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("the dropped prefix's file %s was not removed: %s", path, error)

    def _read(self, path: Path) -> None:
        try:
            with np.load(path) as file:
                tokens, data, adapter = file["tokens"], file["data"], str(file["adapter"])
            if tokens.dtype != np.int32 or data.dtype != np.uint8 or self._path(tokens, adapter) != path:
                raise ValueError("its contents are not what its name says")
        except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
            _log.warning("the pinned prefix %s cannot be used, it is computed again: %s", path, error)
            return
        if self.fits(tokens):
            self._entries[adapter, tokens.tobytes()] = PinnedPrefix(tokens, data, adapter)
            self._evict()


def reuse_prefix(
    executor: Executor, table: SlotTable, pinned: PinnedStore, slot: int, prompt: Tokens, adapter: str = ""
) -> int:
    """Bring as much of `prompt` as is known and may be reused into `slot`, and return how many tokens that is.

    Only what was computed with the same adapter (its fingerprint) is reused.
    """
    head = prompt[: reusable_length(len(prompt))]
    length = table.common_prefix(slot, head, adapter)
    donor, donor_length = table.donor(slot, head, adapter)
    entry, pinned_length = pinned.find(head, adapter)
    worthwhile = length + MIN_REUSE  # in place costs nothing, a copy has to save something
    if donor_length >= worthwhile and donor_length >= pinned_length:
        executor.copy_prefix(donor, slot, donor_length)
        length = donor_length
    elif entry is not None and pinned_length >= worthwhile and len(entry.tokens) <= table.capacity:
        executor.load_prefix(slot, entry.data, len(entry.tokens))
        length = pinned_length
        pinned.touch(entry.tokens, adapter)
    length -= length % ROW_ALIGN
    table.restart(slot, adapter)
    table.extend(slot, head[:length])
    return length
