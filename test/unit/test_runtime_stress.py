"""The engine under many threads and many requests: every request ends exactly once, and nothing is left behind."""

from __future__ import annotations

import gc
import random
import threading
from collections import Counter
from collections.abc import Sequence as Steps

import pytest
from doubles import BYTE_VOCAB, FakeExecutor, byte_tokenizer, reference_greedy
from run_double import RunFakeExecutor

from edgellm_ros.config import EngineConfig
from edgellm_ros.core import FinishReason, Phase, SamplingParams
from edgellm_ros.errors import DeviceError, EdgeLLMError, QueueFullError, UnavailableError
from edgellm_ros.executors.base import SequenceStep
from edgellm_ros.runtime.engine import Engine
from edgellm_ros.runtime.sequence import Job, Sequence

WAIT_S = 30.0
TOKENIZER = byte_tokenizer()


def job(text: str, max_tokens: int, **fields: object) -> Job:
    return Job(tuple(text.encode()), SamplingParams(temperature=0.0, max_tokens=max_tokens), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("executor_type", [FakeExecutor, RunFakeExecutor])
@pytest.mark.parametrize("ending", ["close", "failure"])
def test_every_request_of_many_threads_ends_exactly_once(ending: str, executor_type: type[FakeExecutor]) -> None:
    steps = 0

    def count(batch: Steps[SequenceStep]) -> None:
        nonlocal steps
        steps += 1
        if ending == "failure" and steps > 300:
            raise DeviceError("lost")

    executor = executor_type(num_slots=3, allowed=128, before_step=count)
    if isinstance(executor, RunFakeExecutor):
        executor.run.hook = lambda event: count([])
    engine = Engine(executor, TOKENIZER, EngineConfig(max_queue=5))
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()

    def client(number: int) -> None:
        rng = random.Random(number)
        for i in range(200):
            text = f"{rng.randrange(4)} client {number} asks {i}" * rng.randrange(1, 4)
            try:
                generation = engine.submit(job(text, rng.randrange(1, 12), priority=rng.randrange(3)))
            except QueueFullError:
                continue
            except (UnavailableError, DeviceError):
                break
            if rng.random() < 0.3:
                generation.cancel()
            deltas = list(generation)
            assert [d.phase for d in deltas].count(Phase.DONE) == 1 and deltas[-1].phase is Phase.DONE
            tokens = [t for d in deltas for t in d.token_ids]
            assert tokens == reference_greedy(text.encode(), len(tokens), BYTE_VOCAB, 128)
            with lock:
                outcomes[str(deltas[-1].finish_reason)] += 1

    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            client(number)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    if ending == "close":
        while engine.metrics().submitted < 60:
            threads[0].join(0.001)
        engine.close()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    engine.close()
    assert not failures
    state = engine.metrics()
    assert state.waiting == state.active == 0
    assert sum(state.finished.values()) == state.submitted == outcomes.total()


@pytest.mark.parametrize("executor_type", [FakeExecutor, RunFakeExecutor])
def test_an_engine_keeps_nothing_of_requests_that_have_ended(executor_type: type[FakeExecutor]) -> None:
    engine = Engine(executor_type(num_slots=2, allowed=128), TOKENIZER, EngineConfig(max_queue=50))
    for round_ in range(3):
        for generation in [engine.submit(job(f"{round_} {i}", 2, session_id=f"kept {i}")) for i in range(40)]:
            generation.result(WAIT_S)
    engine.submit(job("the last one lets go of those before", 2)).result(WAIT_S)
    del generation
    gc.collect()
    left = [found for found in gc.get_objects() if type(found) is Sequence and "kept" in found.job.session_id]
    assert not left
    engine.close()


@pytest.mark.parametrize("executor_type", [FakeExecutor, RunFakeExecutor])
def test_what_the_metrics_say_adds_up(executor_type: type[FakeExecutor]) -> None:
    engine = Engine(executor_type(num_slots=2, allowed=128), TOKENIZER, EngineConfig(max_queue=50))
    results = [engine.submit(job(f"request number {i % 3} of a few", 5)) for i in range(9)]
    usages = [generation.result(WAIT_S).usage for generation in results]
    engine.close()
    state = engine.metrics()
    assert state.finished == {FinishReason.LENGTH: 9} and state.submitted == 9
    assert state.prompt_tokens == sum(u.prompt_tokens for u in usages)
    assert state.cached_tokens == sum(u.cached_tokens for u in usages) > 0
    assert state.completion_tokens == sum(u.completion_tokens for u in usages) == 45
    assert state.decode_tokens_per_s * state.decode_s == pytest.approx(45 - 9)
    assert state.prefill_tokens_per_s * state.prefill_s == pytest.approx(state.prompt_tokens - state.cached_tokens)
    for name in ("queue", "prefill", "time_to_first_token", "total"):
        stage = state.stages[name]
        assert stage.count == 9 and 0 <= stage.p50 <= stage.p95 <= stage.p99
    longest = max(u.time_to_first_token_s for u in usages)
    assert state.stages["time_to_first_token"].p99 <= longest <= state.stages["total"].p99 * 1.5


def test_an_error_of_the_caller_leaves_the_engine_as_it_was() -> None:
    engine = Engine(FakeExecutor(num_slots=1, allowed=128), TOKENIZER, EngineConfig(max_queue=0))
    for _ in range(5):
        with pytest.raises(EdgeLLMError):
            engine.submit(job("x" * 999, 1))
    assert engine.submit(job("fine", 1)).result(WAIT_S).finish_reason is FinishReason.LENGTH
    engine.close()
