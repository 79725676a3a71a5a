"""The engine over an executor that draws tokens itself: the same answers, one step ahead, and no token lost or repeated."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from doubles import BYTE_VOCAB, EOS, FakeExecutor, byte_tokenizer, reference_greedy
from run_double import RunFakeExecutor
from runtime_steps import WAIT_S, FakeClock, Valve, job, until

from edgellm_ros.core import Completion, FinishReason, SamplingParams
from edgellm_ros.errors import DeviceError
from edgellm_ros.runtime import engine as engine_module
from edgellm_ros.runtime.engine import Engine
from edgellm_ros.runtime.generation import Generation
from edgellm_ros.runtime.sequence import Job, Sequence

TOKENIZER = byte_tokenizer()


@pytest.fixture
def start(start: Callable[..., Engine]) -> Callable[..., Engine]:
    """With room for all that these tests ask at once."""
    return lambda executor, **settings: start(executor, **{"max_queue": 100, **settings})


def mixed_jobs(seed: int, count: int) -> list[Job]:
    rng = random.Random(seed)
    jobs = []
    for i in range(count):
        sampling: dict[str, Any] = {"seed": rng.randrange(2**63), "temperature": rng.choice([0.0, 0.5, 1.0, 2.0])}
        for name, values in {
            "top_k": (0, 1, 5, 40),
            "top_p": (1.0, 0.5, 0.9),
            "min_p": (0.0, 0.1),
            "repetition_penalty": (1.0, 1.4),
            "presence_penalty": (0.0, 0.7),
            "frequency_penalty": (0.0, -0.3),
            "logprobs": (None, None, 0, 3),
            "logit_bias": ({}, {}, {97: 3.0, 98: -3.0}),
            "stop": ((), ("e",), ("ab", "th")),
        }.items():
            sampling[name] = rng.choice(values)
        text = "".join(rng.choice("abcdefgh ") for _ in range(rng.choice([1, 2, 15, 16, 17, 40, 70])))
        stop_ids = frozenset(rng.sample(range(128), rng.choice([0, 0, 10])))
        jobs.append(job(text, rng.randrange(1, 30), priority=i % 3, stop_ids=stop_ids, **sampling))
    return jobs


def answers(engine: Engine, jobs: list[Job], pause_s: float = 0.0) -> list[Completion]:
    running: list[Generation] = []
    for one in jobs:
        running.append(engine.submit(one))
        time.sleep(pause_s)
    return [generation.result(WAIT_S) for generation in running]


def same(a: Completion, b: Completion) -> bool:
    return (a.token_ids, a.text, a.finish_reason, a.logprobs) == (b.token_ids, b.text, b.finish_reason, b.logprobs)


VARIANTS: dict[str, dict[str, Any]] = {
    "one run": {},
    "several runs": {"max_sequences": 2},
    "some on the host": {"can_sample": lambda p: not p.logit_bias and p.logprobs is None},
    "several and some": {"max_sequences": 1, "can_sample": lambda p: not p.logit_bias},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_slots", [1, 3, 5])
@pytest.mark.parametrize("pause_s", [0.0, 0.002])
def test_mixed_requests_get_the_tokens_of_the_plain_path(
    start: Any, variant: str, num_slots: int, pause_s: float
) -> None:
    jobs = mixed_jobs(num_slots, 40)
    settings = {"prefill_chunk": 16, "prefill_chunk_busy": 16}
    plain = answers(start(FakeExecutor(num_slots, allowed=128), **settings), jobs)
    executor = RunFakeExecutor(num_slots, allowed=128, **VARIANTS[variant])
    got = answers(start(executor, **settings), jobs, pause_s)
    for i, (a, b) in enumerate(zip(plain, got, strict=True)):
        assert same(a, b), (i, jobs[i], a, b)
    assert executor.run.events.count("launch") > 20 and len(executor.threads) == 1


def test_the_next_step_is_launched_before_the_last_one_is_read(start: Any) -> None:
    executor = RunFakeExecutor(allowed=128)
    result = start(executor).submit(job("ahead", 7)).result(WAIT_S)
    assert list(result.token_ids) == reference_greedy(b"ahead", 7, BYTE_VOCAB, 128)
    events = executor.run.events
    assert events == ["start", "launch", *["launch", "read"] * 5, "read"]  # the first token came from the prompt
    assert executor.run.num_computed == 6, "no step more than the answer needs"


def test_an_ended_sequence_has_one_token_computed_in_vain_and_its_slot_is_reused_rightly(start: Any) -> None:
    prompt = "a conversation of some length."
    tokens = reference_greedy(prompt.encode(), 40, BYTE_VOCAB, 128)
    at = next(i for i in range(12, 40) if tokens[i] not in tokens[:i])
    usages = []
    for executor in (FakeExecutor(1, allowed=128), RunFakeExecutor(1, allowed=128)):
        engine = start(executor)
        first = engine.submit(job(prompt, 100, stop_ids=frozenset({tokens[at]}))).result(WAIT_S)
        assert first.finish_reason is FinishReason.STOP and list(first.token_ids) == tokens[: at + 1]
        if isinstance(executor, RunFakeExecutor):
            until(lambda: len(executor.run.unread) == 0)  # noqa: B023
            assert executor.run.num_computed == at + 1, "one more than the tokens after the first"
        turn = prompt + bytes(tokens[: at + 1]).decode() + " And then?"
        second = engine.submit(job(turn, 9)).result(WAIT_S)
        assert list(second.token_ids) == reference_greedy(turn.encode(), 9, BYTE_VOCAB, 128)
        usages.append(second.usage.cached_tokens)
    assert usages[0] == usages[1] > 30


def test_stop_texts_end_the_answer_where_they_do_on_the_plain_path(start: Any) -> None:
    engine = start(RunFakeExecutor(allowed=128))
    whole = engine.submit(job("stop text", 30)).result(WAIT_S).text
    for first in range(3, 25):
        stop = whole[first : first + 3]
        result = engine.submit(job("stop text", 30, stop=(stop,))).result(WAIT_S)
        assert result.text == whole[: whole.index(stop)] and result.finish_reason is FinishReason.STOP


def test_a_full_context_ends_with_length_and_nothing_is_computed_past_it(start: Any) -> None:
    engine = start(RunFakeExecutor(2, capacity=32, allowed=128))
    long, short = engine.submit(job("x" * 20, 1000)), engine.submit(job("y" * 29, 1000))
    for generation, text, count in ((long, "x" * 20, 12), (short, "y" * 29, 3)):
        result = generation.result(WAIT_S)
        assert result.finish_reason is FinishReason.LENGTH
        assert list(result.token_ids) == reference_greedy(text.encode(), count, BYTE_VOCAB, 128)


def test_joining_and_leaving_loses_and_repeats_no_token(start: Any) -> None:
    executor = RunFakeExecutor(4, allowed=128)
    valve = Valve("read", 3)
    executor.run.hook = valve
    engine = start(executor)
    jobs = [job(f"sequence number {i}", 20 + 7 * i) for i in range(4)]
    running = [engine.submit(jobs[0])]
    assert valve.held.wait(WAIT_S)  # two steps of the first are under way
    running += [engine.submit(one) for one in jobs[1:]]
    valve.opened.set()
    for one, generation in zip(jobs, running, strict=True):
        wanted = reference_greedy(bytes(one.prompt_ids), one.sampling.max_tokens, BYTE_VOCAB, 128)
        assert list(generation.result(WAIT_S).token_ids) == wanted
    assert executor.run.num_computed == sum(one.sampling.max_tokens - 1 for one in jobs), "every token was used"
    assert {len(batch) for batch in executor.run.batches} == {1, 2, 3, 4}


@pytest.mark.parametrize("ending", ["cancel", "deadline"])
def test_cancel_and_deadline_end_one_sequence_and_not_the_others(
    start: Any, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    clock = FakeClock()
    monkeypatch.setattr(engine_module, "time", clock)
    executor = RunFakeExecutor(2, allowed=128)
    valve = Valve("read", 5)
    executor.run.hook = valve
    engine = start(executor)
    deadline = {"submitted_at": clock.now, "deadline_s": 0.5} if ending == "deadline" else {}
    ended, other = engine.submit(job("ended", 200, **deadline)), engine.submit(job("other", 40))
    assert valve.held.wait(WAIT_S)
    if ending == "cancel":
        ended.cancel()
    else:
        clock.now += 0.5
    valve.opened.set()
    result = ended.result(WAIT_S)
    assert result.finish_reason is FinishReason(ending if ending == "deadline" else "cancelled")
    assert list(result.token_ids) == reference_greedy(b"ended", len(result.token_ids), BYTE_VOCAB, 128)
    assert 0 < len(result.token_ids) < 15
    assert list(other.result(WAIT_S).token_ids) == reference_greedy(b"other", 40, BYTE_VOCAB, 128)


@pytest.mark.parametrize("place", ["start", "launch", "read"])
@pytest.mark.parametrize("failure", [DeviceError("lost at attention.cu:7"), ValueError("odd")])
def test_a_failing_run_ends_everything_and_new_jobs_get_that_error(start: Any, place: str, failure: Exception) -> None:
    executor = RunFakeExecutor(2, allowed=128)
    seen = 0

    def fail(event: str) -> None:
        nonlocal seen
        seen += event == place
        if seen > (0 if place == "start" else 4):
            raise failure

    executor.run.hook = fail
    engine = start(executor)
    running = []
    for i in range(4):
        try:
            running.append(engine.submit(job(f"{i}", 30)))
        except DeviceError:
            break
    assert running
    for generation in running:
        deltas = list(generation)
        assert deltas[-1].finish_reason is FinishReason.ERROR
        with pytest.raises(DeviceError, match=str(failure)):
            generation.result(WAIT_S)
    for _ in range(2):
        with pytest.raises(DeviceError, match=f"must be loaded again.*{failure}"):
            engine.submit(job("more"))
    engine.close()
    assert executor.closed == 1


def test_logits_that_are_not_finite_end_only_their_own_request(start: Any) -> None:
    executor = RunFakeExecutor(2, allowed=128)
    executor.poisoned = {0: 9}
    engine = start(executor)
    bad, good = engine.submit(job("aaaa", 20)), engine.submit(job("bbbb", 20))
    deltas = list(bad)
    assert sum(len(d.token_ids) for d in deltas) == 6
    with pytest.raises(DeviceError, match="not finite"):
        bad.result(WAIT_S)
    assert list(good.result(WAIT_S).token_ids) == reference_greedy(b"bbbb", 20, BYTE_VOCAB, 128)


def test_a_slot_whose_logits_were_not_finite_is_no_source_of_prefixes(start: Any) -> None:
    executor = RunFakeExecutor(1, allowed=128)
    executor.poisoned = {0: 45}
    engine = start(executor)
    with pytest.raises(DeviceError, match="not finite"):
        engine.submit(job("a" * 40, 20)).result(WAIT_S)
    executor.poisoned = {}
    cached = [engine.submit(job("a" * 40, 2)).result(WAIT_S).usage.cached_tokens for _ in range(2)]
    assert cached == [0, 32]


def test_where_a_request_is_sampled_depends_on_the_request_alone(start: Any) -> None:
    executor = RunFakeExecutor(4, allowed=128, can_sample=lambda p: not p.logit_bias)
    engine = start(executor)
    biased = [job(f"host {i}", 12, temperature=1.0, seed=i, logit_bias={5: 1.0}) for i in range(2)]
    free = [job(f"device {i}", 12, temperature=1.0, seed=i) for i in range(2)]
    together = answers(engine, [biased[0], free[0], biased[1], free[1]])
    decoded = sum(len(s.token_ids) for call in executor.calls for s in call) - sum(
        len(one.prompt_ids) for one in (*biased, *free)
    )
    assert decoded == executor.run.num_computed == 2 * 11
    for one, wanted in zip([biased[0], free[0], biased[1], free[1]], together, strict=True):
        assert same(engine.submit(one).result(WAIT_S), wanted)


def test_an_open_seed_is_one_seed_on_host_and_device(start: Any) -> None:
    """The first token is drawn by the host, the others by the device, all from the seed that the sequence chose."""
    seeds = []
    executor = RunFakeExecutor(1, allowed=128)
    begin = executor.run.start
    executor.run.start = lambda sequences: (seeds.append(sequences[0].seed), begin(sequences))[1]  # type: ignore[assignment]
    result = start(executor).submit(job("open seed", 30, temperature=1.5)).result(WAIT_S)
    plain = start(FakeExecutor(1, allowed=128))
    assert (
        plain.submit(job("open seed", 30, temperature=1.5, seed=seeds[0])).result(WAIT_S).token_ids == result.token_ids
    )


def test_tokens_are_shown_while_a_long_prompt_of_another_is_read(start: Any) -> None:
    executor = RunFakeExecutor(2, allowed=128)
    valve = Valve("read", 4)
    executor.run.hook = valve
    engine = start(executor, prefill_chunk=16, prefill_chunk_busy=16)
    first = engine.submit(job("first", 60))
    assert valve.held.wait(WAIT_S)
    second = engine.submit(job("p" * 160, 5))
    valve.opened.set()
    assert list(second.result(WAIT_S).token_ids) == reference_greedy(b"p" * 160, 5, BYTE_VOCAB, 128)
    assert list(first.result(WAIT_S).token_ids) == reference_greedy(b"first", 60, BYTE_VOCAB, 128)
    assert executor.run.events.count("start") >= 10, "between two chunks the others go on"


def test_nothing_is_kept_and_nothing_runs_after_the_last_request(start: Any) -> None:
    executor = RunFakeExecutor(2, allowed=128)
    engine = start(executor)
    generation = engine.submit(job("kept or not", 200, session_id="kept", stop_ids=frozenset(range(64))))
    generation.result(WAIT_S)
    until(lambda: not engine._run.sequences and not executor.run.unread)
    count = len(executor.run.events)
    del generation
    time.sleep(0.05)
    gc.collect()
    assert len(executor.run.events) == count
    assert not [found for found in gc.get_objects() if type(found) is Sequence and found.job.session_id == "kept"]


def test_the_end_token_drawn_on_the_device_ends_the_answer(start: Any) -> None:
    class EndsLater(RunFakeExecutor):
        def compute(self, slot: int, position: int, token: int) -> Any:
            row = super().compute(slot, position, token)
            if position == 12:
                row[EOS] = 1000.0
            return row

    engine = start(EndsLater(allowed=128))
    result = engine.submit(job("short", 50, stop_ids=frozenset({EOS}))).result(WAIT_S)
    assert result.finish_reason is FinishReason.STOP and len(result.token_ids) == 13 - len("short") + 1
    assert result.token_ids[-1] == EOS and result.text == bytes(result.token_ids[:-1]).decode()


def test_closing_during_a_run_ends_it(start: Any) -> None:
    executor = RunFakeExecutor(1, allowed=128)
    valve = Valve("read", 3)
    executor.run.hook = valve
    engine = start(executor)
    generation = engine.submit(job("closing", 200))
    assert valve.held.wait(WAIT_S)
    closer = threading.Thread(target=engine.close)
    closer.start()
    until(lambda: engine._closing)
    valve.opened.set()
    closer.join(WAIT_S)
    assert not closer.is_alive() and executor.closed == 1
    assert generation.result(0).finish_reason is FinishReason.CANCELLED


def test_the_double_masks_as_the_contract_says() -> None:
    """A masked sequence cannot run ahead: its mask is set between reading a token and the next launch."""
    from edgellm_ros.executors.base import RunSequence, SequenceStep

    executor = RunFakeExecutor(1, allowed=128)
    prompt = np.arange(5, dtype=np.int32)
    executor.step([SequenceStep(0, prompt, 0)])
    sampling = SamplingParams(temperature=0.0)
    executor.run.start([RunSequence(0, 5, [9], prompt, sampling, 1, masked=True)])
    tokens = []
    for i in range(5):
        mask = np.zeros(BYTE_VOCAB, np.bool_)
        mask[10 * i : 10 * i + 10] = True
        executor.run.set_mask(0, mask)
        executor.run.launch()
        tokens += executor.run.read().token_ids
    assert [token // 10 for token in tokens] == [0, 1, 2, 3, 4]
