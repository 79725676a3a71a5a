"""The run under way on an executor: which sequences are in it, and which of its steps are launched and not yet read."""

from __future__ import annotations

from collections.abc import Sequence as Items

from edgellm_ros.core import TokenLogprob
from edgellm_ros.executors.base import DecodeRun, RunSequence
from edgellm_ros.runtime.sequence import Sequence


class DeviceRun:
    """Keeps a DecodeRun's books. `sequences` is empty when no run is under way."""

    def __init__(self, run: DecodeRun | None) -> None:
        """Of an executor without runs nothing is ever taken."""
        self._run = run
        self.sequences: list[Sequence] = []
        self.num_unread = 0  # steps launched and not yet read
        self._num_left = 0  # steps that may still be launched

    def takes(self, sequence: Sequence) -> bool:
        """Whether the tokens of a sequence after its first are drawn here: the request alone decides."""
        if sequence.on_device is None:
            sequence.on_device = self._run is not None and self._run.can_sample(sequence.job.sampling)
        return sequence.on_device

    def groups(self, sequences: list[Sequence]) -> list[list[Sequence]]:
        """Cut sequences into runs that the executor can hold."""
        size = self._run.max_sequences if self._run is not None else 1
        return [sequences[start : start + size] for start in range(0, len(sequences), size)]

    def start(self, sequences: list[Sequence]) -> None:
        """Begin a run; every step of the one before was read."""
        assert self._run is not None and not self.num_unread
        self._run.start([_run_sequence(sequence) for sequence in sequences])
        self.sequences = list(sequences)
        # A sequence that ends for another reason has more tokens computed than it needs, which are dropped; one that
        # ends with this step does not, so that no step goes past a slot's end.
        self._num_left = min(sequence.max_tokens - len(sequence.token_ids) for sequence in sequences)

    def can_launch(self) -> bool:
        """Whether another step is of use to every sequence that was in the run at its start."""
        return self._num_left > 0

    def launch(self) -> None:
        """Compute one more token of every sequence, without waiting."""
        assert self._run is not None and self.can_launch()
        self._run.launch()
        self._num_left -= 1
        self.num_unread += 1

    def read(self) -> list[tuple[Sequence, int, TokenLogprob | None]]:
        """Wait for the oldest unread step; the tokens of those sequences that have not ended since."""
        assert self._run is not None and self.num_unread
        step = self._run.read()
        self.num_unread -= 1
        entries: Items[tuple[Sequence, int, TokenLogprob | None]] = list(
            zip(self.sequences, step.token_ids, step.logprobs, strict=True)
        )
        return [entry for entry in entries if not entry[0].ended]

    def stop(self) -> None:
        """Forget the run, all of whose steps were read."""
        assert not self.num_unread
        self.sequences, self._num_left = [], 0


def _run_sequence(sequence: Sequence) -> RunSequence:
    return RunSequence(
        sequence.slot,
        sequence.num_computed,
        sequence.token_ids,
        sequence.prompt,
        sequence.job.sampling,
        sequence.seed,
        adapter=sequence.adapter.index,
    )
