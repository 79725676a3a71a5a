"""Which tokens' keys and values are in which slot, who uses it, and which slot a new sequence gets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]

ROW_ALIGN = 8  # tokens; all chunks of a prompt begin at a multiple of this, see `chunk_length`
MIN_REUSE = 16  # tokens; a shorter common prefix is no reason to choose a slot or to copy


class SlotTable:
    """Bookkeeping of an executor's slots. A free slot's tokens stay resident until a new sequence overwrites them.

    A LoRA adapter changes keys and values: tokens are only shared between sequences of the same adapter, which is named
    by its fingerprint (empty: none).
    """

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.num_slots = num_slots
        self.capacity = capacity
        self._tokens = np.zeros((num_slots, capacity), np.int32)
        self._lengths = [0] * num_slots
        self._sessions = [""] * num_slots
        self._adapters = [""] * num_slots
        self._busy = [False] * num_slots
        self._forgotten = [False] * num_slots  # while busy: forget the tokens at release
        self._released_at = [0] * num_slots
        self._clock = 0

    def length(self, slot: int) -> int:
        """Tokens resident in a slot."""
        return self._lengths[slot]

    def resident(self, slot: int) -> Tokens:
        """The tokens resident in a slot (a view)."""
        return self._tokens[slot, : self._lengths[slot]]

    def common_prefix(self, slot: int, prompt: Tokens, adapter: str = "") -> int:
        """Length of the longest common prefix of a slot's tokens and `prompt`; 0 when another adapter computed them."""
        return common_prefix(self.resident(slot), prompt) if self._adapters[slot] == adapter else 0

    def choose(self, prompt: Tokens, session_id: str, adapter: str = "") -> int | None:
        """The slot that a new sequence should get, or None when all are busy.

        In this order: the session's own; the one with the longest common prefix; one beside the busy ones, so that
        the executor can compute them as one range, and of these an empty one or else the one unused longest. Slots
        kept for other sessions are only taken when nothing else is free, the one unused longest first.
        """
        free = [slot for slot in range(self.num_slots) if not self._busy[slot]]
        if not free:
            return None
        if session_id:
            for slot in free:
                if self._sessions[slot] == session_id:
                    return slot
        unclaimed = [slot for slot in free if not self._sessions[slot]]
        if not unclaimed:
            return min(free, key=self._released_at.__getitem__)
        best = max(unclaimed, key=lambda slot: self.common_prefix(slot, prompt, adapter))
        if self.common_prefix(best, prompt, adapter) >= MIN_REUSE:
            return best
        return min(
            unclaimed, key=lambda slot: (self._gap(slot), self._lengths[slot] > 0, self._released_at[slot], slot)
        )

    def donor(self, target: int, prompt: Tokens, adapter: str = "") -> tuple[int, int]:
        """The slot other than `target` with the longest common prefix, busy or not, and that length."""
        others = [
            (self.common_prefix(slot, prompt, adapter), -slot) for slot in range(self.num_slots) if slot != target
        ]
        length, slot = max(others, default=(0, 0))
        return -slot, length

    def acquire(self, slot: int, session_id: str) -> None:
        """Give a free slot to a sequence; its tokens stay until `truncate`."""
        assert not self._busy[slot]
        self._busy[slot] = True
        self._sessions[slot] = session_id

    def restart(self, slot: int, adapter: str = "") -> None:
        """Forget all of a slot's tokens; those that follow are computed with `adapter`."""
        self._lengths[slot] = 0
        self._adapters[slot] = adapter

    def truncate(self, slot: int, length: int) -> None:
        """Forget a slot's tokens from `length` on."""
        assert length <= self._lengths[slot]
        self._lengths[slot] = length

    def extend(self, slot: int, tokens: Tokens | Sequence[int]) -> None:
        """Note that more tokens were computed in a slot."""
        start = self._lengths[slot]
        self._tokens[slot, start : start + len(tokens)] = tokens
        self._lengths[slot] = start + len(tokens)

    def append(self, slot: int, token: int) -> None:
        """Note that one more token was computed in a slot."""
        self._tokens[slot, self._lengths[slot]] = token
        self._lengths[slot] += 1

    def release(self, slot: int, keep: bool = True) -> None:
        """Take a slot from its sequence; `keep` leaves the tokens for reuse."""
        assert self._busy[slot]
        self._busy[slot] = False
        self._clock += 1
        self._released_at[slot] = self._clock
        if self._forgotten[slot] or not keep:
            self._forget(slot)

    def forget_session(self, session_id: str) -> bool:
        """Drop what is resident for a session, at its end where it is running; False when there is nothing."""
        found = [slot for slot in range(self.num_slots) if self._sessions[slot] == session_id and session_id]
        for slot in found:
            if self._busy[slot]:
                self._forgotten[slot] = True
            else:
                self._forget(slot)
        return bool(found)

    def _forget(self, slot: int) -> None:
        self._lengths[slot], self._sessions[slot], self._forgotten[slot] = 0, "", False

    def _gap(self, slot: int) -> int:
        busy = [other for other in range(self.num_slots) if self._busy[other]]
        if not busy:
            return 0
        return max(busy[0] - slot, slot - busy[-1], 1) if not busy[0] < slot < busy[-1] else 0


def chunk_length(remaining: int, limit: int) -> int:
    """How many of the `remaining` prompt tokens to compute in one step of at most `limit` (>= 2 * ROW_ALIGN).

    The answer must not depend on how a prompt was cut, or on how much of it was cached. CPU kernels compute rows in
    groups and round the rows left over otherwise, and a step of one row otherwise again (MatMulNBits with int8
    accumulation does, on AVX-512 in groups of two). So chunks begin at multiples of ROW_ALIGN, and the last one has at
    least two tokens.
    """
    if remaining <= limit:
        return remaining
    count = limit - limit % ROW_ALIGN
    return count - ROW_ALIGN if remaining - count == 1 else count


def reusable_length(prompt_length: int) -> int:
    """How many tokens of a prompt may be taken from a cache: what `chunk_length` says holds for the rest."""
    return max(prompt_length - 2, 0) // ROW_ALIGN * ROW_ALIGN


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Length of the longest common prefix of two arrays of tokens."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length
