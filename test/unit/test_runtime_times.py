"""Deadlines, and the times that an answer and the metrics report: exact, by a clock that the test moves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from doubles import BYTE_VOCAB, FakeExecutor, reference_greedy
from run_double import RunFakeExecutor
from runtime_steps import WAIT_S, FakeClock, Gate, job

from edgellm_ros.core import Completion, FinishReason
from edgellm_ros.runtime import engine as engine_module
from edgellm_ros.runtime import sequence as sequence_module


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The engine's clock."""
    fake = FakeClock()
    monkeypatch.setattr(engine_module, "time", fake)
    monkeypatch.setattr(sequence_module, "time", fake)
    return fake


class Paced:
    """An executor whose prefill takes 1 s a token and whose decode step takes 1 s, by the clock of the test."""

    def __init__(self, clock: FakeClock, executor_type: type[FakeExecutor]) -> None:
        self.num_decoded = 0
        self.started, self.go = threading.Event(), threading.Event()
        self.in_decode: Callable[[int], object] = lambda count: None
        self.executor = executor_type(num_slots=1, allowed=128, before_step=self._step)
        self._clock = clock
        if isinstance(self.executor, RunFakeExecutor):
            self.executor.run.hook = lambda event: self._decode() if event == "read" else None

    def _step(self, batch: Any) -> None:
        self.started.set()
        assert self.go.wait(WAIT_S)
        if batch[0].position:
            self._decode()
        else:
            self._clock.now += len(batch[0].token_ids)

    def _decode(self) -> None:
        self._clock.now += 1.0
        self.num_decoded += 1
        self.in_decode(self.num_decoded)


def times_of(result: Completion) -> tuple[float, ...]:
    usage = result.usage
    return usage.queue_s, usage.prefill_s, usage.time_to_first_token_s, usage.decode_s, usage.total_s


@pytest.mark.parametrize("executor_type", [FakeExecutor, RunFakeExecutor])
def test_an_answer_says_how_long_each_of_its_stages_took(
    start: Any, clock: FakeClock, executor_type: type[FakeExecutor]
) -> None:
    paced = Paced(clock, executor_type)
    engine = start(paced.executor)
    asked_at = clock.now
    clock.now += 2.0  # its caller renders and encodes
    first = engine.submit(job("12345", 3, submitted_at=asked_at))
    assert paced.started.wait(WAIT_S)
    second = engine.submit(job("678", 2, submitted_at=clock.now))
    paced.go.set()
    times = [times_of(generation.result(WAIT_S)) for generation in (first, second)]
    assert times == [(2.0, 5.0, 7.0, 2.0, 9.0), (7.0, 3.0, 10.0, 1.0, 11.0)]
    engine.close()
    state = engine.metrics()
    assert (state.prefill_s, state.decode_s) == (8.0, 3.0)
    assert (state.prefill_tokens_per_s, state.decode_tokens_per_s) == (1.0, 1.0)
    halves = {name: (stage.count, stage.p50) for name, stage in state.stages.items()}
    assert halves == {
        "queue": (2, 4.5),
        "prefill": (2, 4.0),
        "time_to_first_token": (2, 8.5),
        "prefill_step": (2, 4.0),
        "decode_step": (3, 1.0),
        "total": (2, 10.0),
    }


@pytest.mark.parametrize("executor_type", [FakeExecutor, RunFakeExecutor])
def test_decoding_lasts_from_the_first_token_to_the_last_and_not_to_the_end(
    start: Any, clock: FakeClock, executor_type: type[FakeExecutor]
) -> None:
    paced = Paced(clock, executor_type)
    generation = start(paced.executor).submit(job("12345", 30, submitted_at=clock.now))
    paced.in_decode = lambda count: generation.cancel() if count == 3 else None
    paced.go.set()
    result = generation.result(WAIT_S)
    assert result.finish_reason is FinishReason.CANCELLED and len(result.token_ids) == 3
    assert (result.usage.decode_s, result.usage.total_s) == (2.0, 8.0)


def test_what_ends_in_the_queue_has_waited_all_its_time(start: Any, clock: FakeClock) -> None:
    gate = Gate()
    engine = start(FakeExecutor(num_slots=1, allowed=128, before_step=gate))
    running = engine.submit(job("running", 9, submitted_at=clock.now))
    gate.wait()
    waiting = engine.submit(job("waiting", 9, submitted_at=clock.now, deadline_s=3.0))
    clock.now += 4.0
    gate.open()
    result = waiting.result(WAIT_S)
    assert result.finish_reason is FinishReason.DEADLINE
    assert times_of(result) == (4.0, 0.0, 0.0, 0.0, 4.0)
    running.result(WAIT_S)


def test_a_deadline_gives_the_partial_answer(start: Any, clock: FakeClock) -> None:
    gate = Gate()
    executor = FakeExecutor(allowed=128, before_step=gate)
    generation = start(executor).submit(job("late", 100, submitted_at=clock.now, deadline_s=5.0))
    gate.let(2)
    gate.wait()
    clock.now += 5.0
    gate.open()
    result = generation.result(WAIT_S)
    assert result.finish_reason is FinishReason.DEADLINE
    assert list(result.token_ids) == reference_greedy(b"late", 2, BYTE_VOCAB, 128)
    assert len(executor.calls) == 3


@pytest.mark.parametrize(("deadline_s", "reason"), [(999.0, FinishReason.DEADLINE), (2000.0, FinishReason.LENGTH)])
def test_a_deadline_counts_from_when_the_caller_asked(start: Any, deadline_s: float, reason: FinishReason) -> None:
    asked_at = time.monotonic() - 1000.0
    late = start(FakeExecutor(allowed=128)).submit(job("late", 3, deadline_s=deadline_s, submitted_at=asked_at))
    assert late.result(WAIT_S).finish_reason is reason
