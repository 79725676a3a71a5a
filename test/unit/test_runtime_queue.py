"""Requests that wait: who is served first, what each is told, and that a wait ends when its caller or its time does."""

from __future__ import annotations

from typing import Any

import pytest
from doubles import BYTE_VOCAB, FakeExecutor, reference_greedy
from runtime_steps import WAIT_S, Gate, job

from edgellm_ros.core import FinishReason, Phase
from edgellm_ros.errors import QueueFullError


def test_a_full_queue_rejects_and_the_rest_is_served(start: Any) -> None:
    gate = Gate()
    engine = start(FakeExecutor(num_slots=2, allowed=128, before_step=gate), max_queue=4)
    accepted, rejected = [], 0
    for i in range(20):
        try:
            accepted.append(engine.submit(job(f"goal {i}", 3)))
        except QueueFullError as error:
            assert "max_queue" in str(error)
            rejected += 1
    assert (len(accepted), rejected) == (6, 14)
    gate.open()
    for i, generation in enumerate(accepted):
        assert list(generation.result(WAIT_S).token_ids) == reference_greedy(f"goal {i}".encode(), 3, BYTE_VOCAB, 128)
    assert engine.metrics().rejected == 14


def test_a_cancelled_request_that_waits_leaves_its_place_in_the_queue_at_once(start: Any) -> None:
    gate = Gate()
    engine = start(FakeExecutor(num_slots=1, allowed=128, before_step=gate), max_queue=1)
    running = engine.submit(job("running", 3))
    gate.wait()
    waiting = engine.submit(job("waiting", 3))
    with pytest.raises(QueueFullError):
        engine.submit(job("one too many", 3))
    waiting.cancel()  # nobody has ended it yet: the engine is in a step
    accepted = engine.submit(job("accepted", 3))
    gate.open()
    for generation, reason in (
        (running, FinishReason.LENGTH),
        (waiting, FinishReason.CANCELLED),
        (accepted, FinishReason.LENGTH),
    ):
        assert generation.result(WAIT_S).finish_reason is reason


@pytest.mark.parametrize("ending", [FinishReason.CANCELLED, FinishReason.DEADLINE])
def test_a_request_that_waits_ends_while_the_slots_are_still_busy(start: Any, ending: FinishReason) -> None:
    gate = Gate()
    engine = start(FakeExecutor(num_slots=1, allowed=128, before_step=gate))
    running = engine.submit(job("running", 50))
    gate.wait()
    waiting = engine.submit(job("waiting", 3, deadline_s=0.0 if ending is FinishReason.DEADLINE else None))
    if ending is FinishReason.CANCELLED:
        waiting.cancel()
    gate.let(2)  # the prompt and a token, in one turn
    gate.wait()
    assert waiting.done and not running.done
    result = waiting.result(0)
    assert result.finish_reason is ending and not result.token_ids
    assert engine.metrics().waiting == 0


def test_priority_is_served_first_then_age(start: Any) -> None:
    gate, order = Gate(), []
    engine = start(FakeExecutor(num_slots=1, allowed=128, before_step=gate))
    blocker = engine.submit(job("block", 2))
    gate.wait()
    waiting = {}
    for name, priority in (("low 1", 0), ("high 1", 9), ("low 2", 0), ("high 2", 9)):
        waiting[name] = engine.submit(job(name, 1, priority=priority, notify=lambda n=name: order.append(n)))
    gate.open()
    blocker.result(WAIT_S)
    for generation in waiting.values():
        list(generation)
    first = sorted(waiting, key=lambda n: max(i for i, seen in enumerate(order) if seen == n))
    assert first == ["high 1", "high 2", "low 1", "low 2"]


def test_the_place_in_the_queue_is_told_and_told_again(start: Any) -> None:
    gate = Gate()
    engine = start(FakeExecutor(num_slots=1, allowed=128, before_step=gate))
    running = [engine.submit(job("blocks until all are queued", 9))]
    gate.wait()
    running += [engine.submit(job(f"{i}", 2)) for i in range(3)]
    gate.open()
    positions = [[d.queue_position for d in g if d.phase is Phase.QUEUED] for g in running]
    assert positions == [[0], [0], [1, 0], [2, 1, 0]]


def test_cancel_reaches_a_waiting_and_a_prefilling_request(start: Any) -> None:
    gate = Gate()
    executor = FakeExecutor(num_slots=1, allowed=128, before_step=gate)
    engine = start(executor, prefill_chunk=16)
    prefilling = engine.submit(job("p" * 100, 5))
    waiting = engine.submit(job("w", 5))
    assert gate.arrived.acquire(timeout=WAIT_S)
    waiting.cancel()
    prefilling.cancel()
    gate.permits.release()
    for generation in (waiting, prefilling):
        result = generation.result(WAIT_S)
        assert result.finish_reason is FinishReason.CANCELLED and not result.token_ids
    assert len(executor.calls) == 1
