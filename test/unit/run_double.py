"""A stand-in for an executor that draws tokens itself, and gives them to the host one step late, as a device does."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from doubles import ADAPTED, FakeExecutor, fake_logits

from edgellm_ros.core import SamplingParams
from edgellm_ros.errors import DeviceError
from edgellm_ros.executors.base import DecodeRun, LoadedAdapter, RunSequence, RunStep, SequenceStep
from edgellm_ros.runtime.sampling import Sampler, logprob_of


class FakeRun(DecodeRun):
    """Computes a step when it is launched, from tokens that nobody has read yet.

    It refuses a call of the executor that would lose unread steps, a step past a slot's end, and more unread steps than
    two. `events` holds "start", "launch" and "read" as they come; `hook` gets the same word first, and may raise.
    """

    def __init__(self, executor: RunFakeExecutor, max_sequences: int, can_sample: Callable[[SamplingParams], bool]):
        self.max_sequences = max_sequences
        self.events: list[str] = []
        self.batches: list[tuple[int, ...]] = []  # slots of each run
        self.num_computed = 0  # tokens of all launches
        self.hook: Callable[[str], None] | None = None
        self.unread: deque[RunStep] = deque()
        self._executor = executor
        self._can_sample = can_sample
        self._state: list[tuple[RunSequence, Sampler, list[int]]] | None = None
        self._masks: dict[int, npt.NDArray[np.bool_]] = {}

    def can_sample(self, params: SamplingParams) -> bool:
        return self._can_sample(params)

    def start(self, sequences: Sequence[RunSequence]) -> None:
        self._note("start")
        assert not self.unread, "a run is started over steps that were not read"
        assert 1 <= len(sequences) <= self.max_sequences
        assert len({s.slot for s in sequences}) == len(sequences)
        self.batches.append(tuple(s.slot for s in sequences))
        self._masks = {}
        self._state = []
        for s in sequences:
            assert self._can_sample(s.sampling) and len(s.answer_ids) > 0
            sampler: Any = Sampler(s.sampling, self._executor.info.vocab_size, s.prompt_ids.tolist())
            sampler.seed, sampler._index = s.seed, len(s.answer_ids)
            for token in s.answer_ids if sampler._seen is not None else ():
                sampler._seen.add(token)
            self._state.append((s, sampler, [s.position, s.answer_ids[-1]]))

    def launch(self) -> None:
        self._note("launch")
        assert self._state is not None, "a launch outside a run"
        assert len(self.unread) < 2
        tokens, logprobs = [], []
        for index, (s, sampler, at) in enumerate(self._state):
            logits = self._executor.compute(s.slot, at[0], at[1] + ADAPTED * self._executor._contents[s.adapter])
            self.num_computed += 1
            try:
                token = sampler.draw(logits, self._masks.get(index))
            except DeviceError:
                token = -1
            n = s.sampling.logprobs
            tokens.append(token)
            logprobs.append(None if n is None or token < 0 else logprob_of(logits, token, n))
            at[:] = at[0] + 1, max(token, 0)
        self.unread.append(RunStep(tokens, logprobs))

    def set_mask(self, index: int, mask: npt.NDArray[np.bool_]) -> None:
        assert self._state is not None and self._state[index][0].masked and not self.unread
        self._masks[index] = mask

    def read(self) -> RunStep:
        self._note("read")
        return self.unread.popleft()

    def end(self) -> None:
        """Another call of the executor is made."""
        assert not self.unread, "steps of a run are lost"
        self._state = None

    def _note(self, event: str) -> None:
        self._executor.threads.add(threading.get_ident())
        assert not self._executor.closed
        if self.hook is not None:
            self.hook(event)
        self.events.append(event)


class RunFakeExecutor(FakeExecutor):
    """A FakeExecutor with a FakeRun; `poisoned` slots give logits that are not finite from a position on."""

    run: FakeRun

    def __init__(
        self,
        *args: Any,
        max_sequences: int = 8,
        can_sample: Callable[[SamplingParams], bool] = lambda params: True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.run = FakeRun(self, max_sequences, can_sample)
        self.poisoned: dict[int, int] = {}

    def compute(self, slot: int, position: int, token: int) -> npt.NDArray[np.float32]:
        """One token of a run, as the cache has it."""
        assert position < self.info.capacity, "a step outside the slot"
        assert position <= self._valid[slot], "a step after tokens that were not computed"
        self._cache[slot, position] = token
        self._valid[slot] = position + 1
        if position >= self.poisoned.get(slot, self.info.capacity):
            return np.full(self.info.vocab_size, np.nan, np.float32)
        row = fake_logits(self._cache[slot, : position + 1].tolist(), self.info.vocab_size)
        if self._allowed is not None:
            row[self._allowed :] -= 100.0
        return row

    def step(self, batch: Sequence[SequenceStep]) -> npt.NDArray[np.float32]:
        self.run.end()
        return super().step(batch)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self.run.end()
        super().copy_prefix(source, target, length)

    def save_prefix(self, slot: int, length: int) -> npt.NDArray[np.uint8]:
        self.run.end()
        return super().save_prefix(slot, length)

    def load_prefix(self, slot: int, data: npt.NDArray[np.uint8], length: int) -> None:
        self.run.end()
        super().load_prefix(slot, data, length)

    def load_adapter(self, name: str, source: Any) -> LoadedAdapter:
        self.run.end()
        return super().load_adapter(name, source)

    def unload_adapter(self, name: str) -> None:
        self.run.end()
        super().unload_adapter(name)
