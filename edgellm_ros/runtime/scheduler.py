"""Who is served next: which waiting sequence gets a slot, which prompt is computed, and how much of it in one step."""

from __future__ import annotations

import bisect

from edgellm_ros.config import EngineConfig
from edgellm_ros.runtime.kv_cache import chunk_length
from edgellm_ros.runtime.sequence import Sequence


class Scheduler:
    """The waiting and the running sequences, both in the order in which they are served: priority, then age."""

    def __init__(self, config: EngineConfig, num_slots: int) -> None:
        self._config = config
        self._num_slots = num_slots
        self.waiting: list[Sequence] = []
        self.active: list[Sequence] = []

    def is_full(self) -> bool:
        """Whether one more request would exceed the slots and the queue."""
        waiting = sum(not sequence.channel.cancelled for sequence in self.waiting)
        return len(self.active) + waiting >= self._num_slots + self._config.max_queue

    def enqueue(self, sequence: Sequence) -> None:
        """Put a sequence into the queue."""
        bisect.insort(self.waiting, sequence, key=_rank)

    def can_admit(self) -> bool:
        """Whether a sequence waits and a slot is free."""
        return bool(self.waiting) and len(self.active) < self._num_slots

    def admit(self) -> Sequence:
        """Take the first waiting sequence into the running ones."""
        sequence = self.waiting.pop(0)
        bisect.insort(self.active, sequence, key=_rank)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        (self.active if sequence.slot >= 0 else self.waiting).remove(sequence)

    def next_prefill(self) -> Sequence | None:
        """The running sequence whose prompt is computed next."""
        return next((sequence for sequence in self.active if sequence.prefilling), None)

    def decoding(self) -> list[Sequence]:
        """The running sequences with a drawn token to compute, in the order of their slots."""
        return sorted((sequence for sequence in self.active if not sequence.prefilling), key=_slot)

    def chunk(self, sequence: Sequence) -> int:
        """How many prompt tokens of `sequence` to compute in one step: fewer while others decode."""
        busy = any(not other.prefilling for other in self.active)
        limit = self._config.prefill_chunk_busy if busy else self._config.prefill_chunk
        return chunk_length(len(sequence.prompt) - sequence.num_computed, limit)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _slot(sequence: Sequence) -> int:
    return sequence.slot
