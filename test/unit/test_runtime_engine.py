"""The engine: answers do not depend on what else runs, ends are prompt, nothing hangs."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from doubles import BYTE_VOCAB, EOS, FakeExecutor, byte_tokenizer, reference_greedy
from runtime_steps import WAIT_S, Gate, job, until

from edgellm_ros.core import Delta, FinishReason, Phase
from edgellm_ros.errors import (
    ContextOverflowError,
    DeviceError,
    EdgeLLMError,
    RequestError,
    ShuttingDownError,
)
from edgellm_ros.executors.base import SequenceStep
from edgellm_ros.runtime.kv_cache import ROW_ALIGN
from edgellm_ros.runtime.sequence import Job

TOKENIZER = byte_tokenizer()


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(d.text for d in deltas)


def test_greedy_tokens_are_those_of_the_model_without_a_cache(start: Any) -> None:
    engine = start()
    for prompt in ("a", "ab", "hello world " * 9):
        result = engine.submit(job(prompt, 12)).result(WAIT_S)
        assert list(result.token_ids) == reference_greedy(prompt.encode(), 12, BYTE_VOCAB, 128)
        assert result.finish_reason is FinishReason.LENGTH
        assert result.text == bytes(result.token_ids).decode()


def test_many_sequences_together_give_what_each_gives_alone(start: Any) -> None:
    executor = FakeExecutor(num_slots=3, allowed=128)
    engine = start(executor, prefill_chunk=16, prefill_chunk_busy=16, max_queue=20)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 128, n).tolist() for n in (1, 2, 16, 17, 18, 33, 34, 50, 99)]
    running = [engine.submit(job(p, 10 + i, priority=i % 3)) for i, p in enumerate(prompts)]
    for i, (prompt, generation) in enumerate(zip(prompts, running, strict=True)):
        assert list(generation.result(WAIT_S).token_ids) == reference_greedy(prompt, 10 + i, BYTE_VOCAB, 128)
    assert max(len(call) for call in executor.calls) > 1, "sequences decode together in one call"
    assert len(executor.threads) == 1


def test_a_seed_gives_the_same_tokens_alone_and_in_company(start: Any) -> None:
    engine = start()
    wanted = job("seeded", 20, temperature=1.0, seed=7)
    alone = engine.submit(wanted).result(WAIT_S)
    company = [engine.submit(job(f"other {i}", 30, temperature=1.0)) for i in range(3)]
    assert engine.submit(wanted).result(WAIT_S).token_ids == alone.token_ids
    other = engine.submit(job("seeded", 20, temperature=1.0, seed=8)).result(WAIT_S)
    assert other.token_ids != alone.token_ids
    for generation in company:
        generation.result(WAIT_S)


def test_chunks_begin_at_aligned_positions_and_only_a_single_token_prompt_has_a_step_of_one(start: Any) -> None:
    for length in (*range(2, 20), 31, 32, 33, 34, 35, 49, 50):
        for chunk in (16, 19):
            executor = FakeExecutor(num_slots=1, allowed=128)
            engine = start(executor, prefill_chunk=chunk, prefill_chunk_busy=chunk)
            for _ in range(2):  # the second finds the first's prefix
                engine.submit(job([9] * length, 1)).result(WAIT_S)
            steps = [s for call in executor.calls for s in call]
            sizes = [len(s.token_ids) for s in steps]
            assert min(sizes) >= 2 and max(sizes) <= chunk, (length, sizes)
            assert all(s.position % ROW_ALIGN == 0 for s in steps)
            assert sum(s.num_logits for s in steps) == 2


def test_a_prompt_is_read_in_small_chunks_while_others_decode_and_in_large_ones_otherwise(start: Any) -> None:
    gate = Gate()
    executor = FakeExecutor(num_slots=2, allowed=128, before_step=gate)
    engine = start(executor, prefill_chunk=64, prefill_chunk_busy=16)
    first = engine.submit(job("f" * 100, 20))
    gate.let(3)  # two chunks, and a token
    second = engine.submit(job("s" * 100, 2))
    gate.open()
    first.result(WAIT_S)
    second.result(WAIT_S)
    chunks = [(s.slot, len(s.token_ids)) for call in executor.calls for s in call if len(s.token_ids) > 1]
    assert chunks == [(0, 64), (0, 36), *[(1, 16)] * 6, (1, 4)]


def test_deltas_come_in_order_and_end_with_done(start: Any) -> None:
    deltas = list(start().submit(job("order", 5)))
    phases = [d.phase for d in deltas]
    assert phases == [Phase.QUEUED, Phase.PREFILL, *[Phase.DECODE] * 5, Phase.DONE]
    last = deltas[-1]
    assert last.finish_reason is FinishReason.LENGTH and last.usage is not None and last.error is None
    assert last.usage.prompt_tokens == 5 and last.usage.completion_tokens == 5
    assert last.usage.total_s >= last.usage.time_to_first_token_s > 0


def test_a_stop_id_ends_the_answer_and_is_not_text(start: Any) -> None:
    tokens = reference_greedy(b"stop", 10, BYTE_VOCAB, 128)
    at = next(i for i in range(2, 10) if tokens[i] not in tokens[:i])
    deltas = list(start().submit(job("stop", 10, stop_ids=frozenset({tokens[at]}))))
    assert text_of(deltas) == bytes(tokens[:at]).decode()
    assert deltas[-1].finish_reason is FinishReason.STOP


def test_a_stop_text_split_over_tokens_is_never_streamed(start: Any) -> None:
    engine = start()
    whole = engine.submit(job("stop text", 30)).result(WAIT_S).text
    stop = whole[12:17]
    cut = whole.index(stop)
    deltas = list(engine.submit(job("stop text", 30, stop=(stop,))))
    assert text_of(deltas) == whole[:cut]
    assert deltas[-1].finish_reason is FinishReason.STOP
    near = whole[25:30] + "never"  # held back to the end, and then shown
    assert text_of(list(engine.submit(job("stop text", 30, stop=(near,))))) == whole


def test_max_tokens_beyond_the_context_ends_with_length(start: Any) -> None:
    engine = start(FakeExecutor(capacity=32, allowed=128))
    result = engine.submit(job("x" * 20, 1000)).result(WAIT_S)
    assert result.finish_reason is FinishReason.LENGTH and len(result.token_ids) == 12
    assert len(engine.submit(job("x" * 31, 5)).result(WAIT_S).token_ids) == 1


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (job([5] * 32), ContextOverflowError, "32 tokens.*holds 32"),
        (job([]), RequestError, "no tokens"),
        (job([BYTE_VOCAB]), RequestError, "0 to 259"),
        (job([-1]), RequestError, "0 to 259"),
        (job([1.5]), RequestError, "whole number"),  # type: ignore[list-item]
        (job([1], logit_bias={BYTE_VOCAB: 1.0}), RequestError, "logit_bias has token id 260"),
    ],
)
def test_a_bad_job_is_refused_before_any_work(start: Any, bad: Job, error: type[Exception], words: str) -> None:
    executor = FakeExecutor(capacity=32)
    engine = start(executor)
    with pytest.raises(error, match=words):
        engine.submit(bad)
    assert not executor.calls and engine.metrics().submitted == 0


def test_cancel_takes_effect_at_the_next_token(start: Any) -> None:
    gate = Gate()
    executor = FakeExecutor(allowed=128, before_step=gate)
    generation = start(executor).submit(job("cancel me", 100))
    gate.let(4)
    assert gate.arrived.acquire(timeout=WAIT_S)  # inside the fifth step
    generation.cancel()
    generation.cancel()
    gate.permits.release()
    result = generation.result(WAIT_S)
    assert result.finish_reason is FinishReason.CANCELLED
    assert list(result.token_ids) == reference_greedy(b"cancel me", 4, BYTE_VOCAB, 128)
    assert len(executor.calls) == 5


def test_an_abandoned_generation_is_cancelled(start: Any) -> None:
    gate = Gate()
    engine = start(FakeExecutor(allowed=128, before_step=gate))
    generation = engine.submit(job("abandoned", 200))
    gate.let(1)
    del generation
    gc.collect()
    gate.open()
    until(lambda: engine.metrics().finished.get(FinishReason.CANCELLED) == 1)


@pytest.mark.parametrize("failure", [DeviceError("lost"), ValueError("odd")])
def test_a_failing_executor_ends_everything_and_nothing_hangs(start: Any, failure: Exception) -> None:
    gate = Gate()

    def fail(batch: Sequence[SequenceStep]) -> None:
        gate(batch)
        if gate.opened:
            raise failure

    executor = FakeExecutor(num_slots=1, allowed=128, before_step=fail)
    engine = start(executor)
    running = [engine.submit(job(f"{i}", 9)) for i in range(3)]
    gate.let(2)
    gate.open()
    for generation in running:
        deltas = list(generation)
        assert deltas[-1].finish_reason is FinishReason.ERROR
        assert isinstance(deltas[-1].error, DeviceError)
        with pytest.raises(DeviceError, match=str(failure)):
            generation.result(WAIT_S)
    with pytest.raises(DeviceError, match=str(failure)):
        engine.submit(job("more"))
    engine.close()
    assert executor.closed == 1


def test_logits_that_are_not_finite_end_only_their_own_request(start: Any) -> None:
    executor = FakeExecutor(allowed=128)
    step = executor.step

    def poisoned(batch: Sequence[SequenceStep]) -> Any:
        logits = step(batch)
        for i, s in enumerate(batch):
            if s.slot == 0 and s.position > 6:
                logits[i] = np.nan
        return logits

    executor.step = poisoned  # type: ignore[method-assign]
    engine = start(executor)
    bad = engine.submit(job("aaaa", 20))
    good = engine.submit(job("bbbb", 20))
    with pytest.raises(EdgeLLMError, match="not finite"):
        bad.result(WAIT_S)
    assert list(good.result(WAIT_S).token_ids) == reference_greedy(b"bbbb", 20, BYTE_VOCAB, 128)


def test_close_ends_what_runs_and_what_waits(start: Any) -> None:
    gate = Gate()
    executor = FakeExecutor(num_slots=1, allowed=128, before_step=gate)
    engine = start(executor)
    running, waiting = engine.submit(job("r", 50)), engine.submit(job("w", 50))
    gate.let(2)
    closer = threading.Thread(target=engine.close)
    closer.start()
    until(lambda: engine._closing)
    gate.open()
    closer.join(WAIT_S)
    assert not closer.is_alive() and executor.closed == 1
    assert running.result(0).finish_reason is FinishReason.CANCELLED
    assert list(waiting)[-1].finish_reason is FinishReason.ERROR
    with pytest.raises(ShuttingDownError):
        waiting.result(0)
    with pytest.raises(ShuttingDownError):
        engine.submit(job("late"))
    engine.close()


def test_a_failing_notify_or_splitter_hurts_nobody_else(start: Any) -> None:
    class Broken:
        def push(self, text: str) -> tuple[str, str]:
            raise KeyError("push")

        def finish(self) -> tuple[str, str]:
            raise KeyError("finish")

    engine = start()
    broken = engine.submit(job("b", 5, splitter=Broken()))
    noisy = engine.submit(job("n", 5, notify=lambda: 1 / 0))
    with pytest.raises(EdgeLLMError, match="push"):
        broken.result(WAIT_S)
    assert len(noisy.result(WAIT_S).token_ids) == 5


def test_an_idle_engine_does_not_run(start: Any) -> None:
    engine = start()
    engine.submit(job("once", 2)).result(WAIT_S)
    turns, waits = [], []
    wait = engine._changed.wait
    engine._turn = lambda: turns.append(1)
    engine._changed.wait = lambda *args: (waits.append(args), wait(*args))[1]
    time.sleep(0.1)
    assert not turns and len(waits) <= 1, "it falls asleep once, and is not woken"


def test_drain_and_notify_give_every_delta_once(start: Any) -> None:
    woken = threading.Semaphore(0)
    generation = start().submit(job("drained", 6, notify=woken.release))
    seen: list[Delta] = []
    while not seen or seen[-1].phase is not Phase.DONE:
        assert woken.acquire(timeout=WAIT_S)
        seen += generation.drain()
    assert text_of(seen) == generation.result(0).text
    assert generation.drain() == [] and list(generation) == []


def test_logprobs_are_those_of_the_model(start: Any) -> None:
    deltas = list(start().submit(job("logprobs", 3, logprobs=4)))
    entries = [entry for d in deltas for entry in d.logprobs]
    assert len(entries) == 3
    for entry in entries:
        assert len(entry.top) == 4 and entry.top[0] == (entry.token_id, entry.logprob)


def test_the_end_token_counts_and_only_ignore_eos_goes_past_it(start: Any) -> None:
    engine = start()
    bias = {EOS: 1000.0}
    result = engine.submit(job("eos", 5, stop_ids=frozenset({EOS}), logit_bias=bias)).result(WAIT_S)
    assert (result.token_ids, result.text, result.usage.completion_tokens) == ((EOS,), "", 1)
