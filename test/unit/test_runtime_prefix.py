"""Prefix reuse: computes less, changes no answer, survives eviction where pinned, and a restart where asked."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles import BYTE_VOCAB, FakeExecutor, byte_tokenizer, reference_greedy
from run_double import RunFakeExecutor

from edgellm_ros.config import EngineConfig
from edgellm_ros.core import Completion, SamplingParams
from edgellm_ros.errors import RequestError
from edgellm_ros.executors.base import LoadedAdapter
from edgellm_ros.runtime import prefix_cache
from edgellm_ros.runtime.engine import Engine
from edgellm_ros.runtime.kv_cache import ROW_ALIGN, SlotTable, common_prefix
from edgellm_ros.runtime.prefix_cache import PinnedStore
from edgellm_ros.runtime.sequence import Job

WAIT_S = 20.0
TOKENIZER = byte_tokenizer()
ADAPTERS = {"red": LoadedAdapter(1, "fingerprint of red"), "blue": LoadedAdapter(2, "fingerprint of blue")}
SYSTEM = "You are a careful robot that speaks little. "


class Rig:
    """An engine over a fake executor, and what it computed."""

    executor_type: type[FakeExecutor] = FakeExecutor

    def __init__(self, num_slots: int = 2, pinned: PinnedStore | None = None, **settings: Any) -> None:
        self.executor = self.executor_type(num_slots=num_slots, allowed=128, adapters=ADAPTERS)
        self.engine = Engine(self.executor, TOKENIZER, EngineConfig(**settings), pinned)

    def job(self, text: str, max_tokens: int = 4, **fields: Any) -> Job:
        return Job(tuple(text.encode()), SamplingParams(temperature=0.0, max_tokens=max_tokens), **fields)

    def run(self, text: str, max_tokens: int = 4, **fields: Any) -> Completion:
        result = self.engine.submit(self.job(text, max_tokens, **fields)).result(WAIT_S)
        adapter = ADAPTERS[fields["lora"]].index if "lora" in fields else 0
        assert list(result.token_ids) == reference_greedy(text.encode(), max_tokens, BYTE_VOCAB, 128, adapter)
        return result


@pytest.fixture(params=[FakeExecutor, RunFakeExecutor])
def rigs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Rig]]:
    monkeypatch.setattr(Rig, "executor_type", request.param)
    made: list[Rig] = []
    yield made
    for rig in made:
        rig.engine.close()


def rig_of(rigs: list[Rig], *args: Any, **kwargs: Any) -> Rig:
    rigs.append(Rig(*args, **kwargs))
    return rigs[-1]


def _aligned(length: int) -> int:
    return length - length % ROW_ALIGN


def _check(fact: bool) -> None:
    assert fact


def test_the_next_turn_of_a_conversation_computes_only_what_is_new(rigs: list[Rig]) -> None:
    rig = rig_of(rigs)
    first = rig.run(SYSTEM + "Hello", 8)
    turn = SYSTEM + "Hello" + first.text + " And now?"
    second = rig.run(turn, 8)
    assert second.usage.cached_tokens == _aligned(len(SYSTEM + "Hello") + 7)  # the last drawn token was not computed
    before = rig.executor.computed_tokens
    assert rig.run(turn, 1).usage.cached_tokens == _aligned(len(turn) - 2)
    assert rig.executor.computed_tokens - before == len(turn) - _aligned(len(turn) - 2) <= 9


def test_without_the_prefix_cache_everything_is_computed(rigs: list[Rig]) -> None:
    rig = rig_of(rigs, prefix_cache=False)
    assert [rig.run(SYSTEM + "Hello").usage.cached_tokens for _ in range(3)] == [0, 0, 0]


def test_a_prefix_is_copied_from_a_busy_slot(rigs: list[Rig]) -> None:
    rig, ready = rig_of(rigs, 3), threading.Event()
    rig.executor.before_step = lambda batch: _check(ready.wait(WAIT_S))
    long = rig.engine.submit(rig.job(SYSTEM + "first", 60))
    second = rig.engine.submit(rig.job(SYSTEM + "second", 5))
    third = rig.engine.submit(rig.job(SYSTEM + "third", 5))
    ready.set()
    assert second.result(WAIT_S).usage.cached_tokens >= _aligned(len(SYSTEM))
    assert third.result(WAIT_S).usage.cached_tokens >= _aligned(len(SYSTEM))
    for name, generation in (("first", long), ("second", second), ("third", third)):
        tokens = list(generation.result(WAIT_S).token_ids)
        assert tokens == reference_greedy((SYSTEM + name).encode(), len(tokens), BYTE_VOCAB, 128)
    assert len(rig.executor.copies) == 2


def test_reuse_never_changes_an_answer(rigs: list[Rig]) -> None:
    rng = random.Random(5)
    rig = rig_of(rigs, 3, prefill_chunk=16, prefill_chunk_busy=16, pinned_tokens=100, max_queue=100)
    texts = [SYSTEM, SYSTEM[:20], "ab", "abc" * 12, "x"]
    running = []
    for _i in range(60):
        text = rng.choice(texts) + "".join(rng.choice("pq ") for _ in range(rng.randrange(12)))
        session = rng.choice(["", "", "s1", "s2", "s3", "s4"])
        pin = rng.choice([0, 0, min(20, len(text))])
        running.append(
            (text, rig.engine.submit(rig.job(text, rng.randrange(1, 20), session_id=session, pin_length=pin)))
        )
        if rng.random() < 0.3:
            running[rng.randrange(len(running))][1].cancel()
        if rng.random() < 0.1:
            rig.engine.reset_session("s1")
        if rng.random() < 0.3:
            running[-1][1].result(WAIT_S)
    for text, generation in running:
        tokens = list(generation.result(WAIT_S).token_ids)
        assert tokens == reference_greedy(text.encode(), len(tokens), BYTE_VOCAB, 128), text
    assert rig.executor.copies and rig.executor.loads and rig.engine.metrics().cached_tokens > 500


def test_a_session_stays_resident_while_others_come_and_go(rigs: list[Rig]) -> None:
    rig = rig_of(rigs, 2)
    kept = rig.run("a long talk with the first person", session_id="first")
    for i in range(5):
        rig.run(f"{i} somebody without a session passes by")
    again = rig.run("a long talk with the first person" + kept.text + "!", session_id="first")
    assert again.usage.cached_tokens >= _aligned(len("a long talk with the first person"))


def test_of_too_many_sessions_the_one_unused_longest_is_evicted(rigs: list[Rig]) -> None:
    rig = rig_of(rigs, 2)
    texts = {name: f"{name} has a talk of its own, longer than sixteen tokens" for name in "abc"}
    for name in ("a", "b", "a", "c"):
        rig.run(texts[name], session_id=name)
    assert rig.run(texts["a"], session_id="a").usage.cached_tokens > 20
    assert rig.run(texts["b"], session_id="b").usage.cached_tokens == 0


def test_a_reset_session_is_forgotten_also_while_it_runs(rigs: list[Rig]) -> None:
    rig = rig_of(rigs)
    text = "the session that is going to be forgotten"
    rig.run(text, session_id="s")
    assert rig.engine.reset_session("s") and not rig.engine.reset_session("s")
    assert not rig.engine.reset_session("") and not rig.engine.reset_session("never")
    assert rig.run(text, session_id="s").usage.cached_tokens == 0
    generation = rig.engine.submit(rig.job(text + "!", 150, session_id="s"))
    for delta in generation:
        if delta.token_ids:
            assert rig.engine.reset_session("s")
            break
    generation.result(WAIT_S)
    assert rig.run(text, session_id="s").usage.cached_tokens == 0


def test_a_pinned_prefix_survives_eviction(rigs: list[Rig]) -> None:
    rig = rig_of(rigs, 1)
    rig.run(SYSTEM + "one", pin_length=len(SYSTEM))
    rig.run("something else that overwrites the only slot there is")
    assert rig.run(SYSTEM + "two").usage.cached_tokens == _aligned(len(SYSTEM))
    assert rig.executor.saves == [(0, len(SYSTEM))] and rig.executor.loads == [(0, len(SYSTEM))]
    rig.run(SYSTEM + "three", pin_length=len(SYSTEM))
    assert len(rig.executor.saves) == 1, "what is pinned is not saved again"


def test_pinned_prefixes_keep_within_their_limit(rigs: list[Rig]) -> None:
    store = PinnedStore(60)
    rig = rig_of(rigs, 1, store)
    for start in ("a" * 25, "b" * 25, "a" * 25, "c" * 25):
        rig.run(start + "?", pin_length=25)
    assert store.num_tokens == 50
    rig.run("d" * 61 + "?", pin_length=61)
    assert store.num_tokens == 50
    found = [store.find(np.full(30, ord(letter), np.int32))[1] for letter in "abcd"]
    assert found == [25, 0, 25, 0], "b was used least recently"


def test_a_pinned_prefix_survives_a_restart_of_the_same_model_only(rigs: list[Rig], tmp_path: Path) -> None:
    rig_of(rigs, 1, PinnedStore(1000, tmp_path, "model A")).run(SYSTEM + "one", pin_length=len(SYSTEM))
    again = rig_of(rigs, 1, PinnedStore(1000, tmp_path, "model A")).run(SYSTEM + "two")
    assert again.usage.cached_tokens == _aligned(len(SYSTEM))
    assert len(PinnedStore(1000, tmp_path, "model B")) == 0


def test_a_damaged_saved_prefix_is_reported_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens, data = np.arange(20, dtype=np.int32), np.arange(80, dtype=np.uint8)
    PinnedStore(100, tmp_path, "k").add(tokens, data)
    (path,) = tmp_path.iterdir()
    assert PinnedStore(100, tmp_path, "k").find(tokens)[1] == 20
    path.write_bytes(path.read_bytes()[:150])
    assert len(PinnedStore(100, tmp_path, "k")) == 0
    assert path.name in caplog.text


def test_a_dropped_prefix_leaves_the_disk_too(tmp_path: Path) -> None:
    store = PinnedStore(30, tmp_path, "k")
    for first in (0, 100, 200):
        store.add(np.arange(first, first + 20, dtype=np.int32), np.zeros(80, np.uint8))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_prefix_in_constant_use_is_not_the_one_that_is_dropped(rigs: list[Rig]) -> None:
    rig = rig_of(rigs, 1, PinnedStore(60))
    for letter in "ab":
        rig.run(letter * 25 + "?", pin_length=25)
    assert rig.run("a" * 25 + "!").usage.cached_tokens == 24  # used by one who does not ask for it to be pinned
    rig.run("c" * 25 + "?", pin_length=25)
    assert [rig.run(letter * 25 + "!").usage.cached_tokens for letter in "ab"] == [24, 0]


def test_a_pinned_prefix_longer_than_the_context_is_not_used(rigs: list[Rig]) -> None:
    store = PinnedStore(1000)
    tokens = np.full(300, ord("s"), np.int32)  # of a run with a larger max_context
    store.add(tokens, tokens.view(np.uint8))
    rig = rig_of(rigs, 1, store)
    assert rig.executor.info.capacity < len(tokens)
    assert rig.run("s" * 40).usage.cached_tokens == 0 and not rig.executor.loads


def test_a_full_disk_costs_a_pinned_prefix_its_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fill(file: Any, **arrays: Any) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", fill)
    store, tokens = PinnedStore(60, tmp_path, "k"), np.arange(20, dtype=np.int32)
    store.add(tokens, np.zeros(80, np.uint8))
    assert store.find(tokens)[1] == 20 and not list(tmp_path.iterdir())
    assert "was not saved" in caplog.text and "No space left" in caplog.text


def test_a_directory_that_became_read_only_costs_no_pinned_prefix_and_no_answer(
    rigs: list[Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))  # for a file that does not exist, too

    rig = rig_of(rigs, 1, PinnedStore(30, tmp_path, "k"))
    rig.run("a" * 25 + "?", pin_length=25)
    (old,) = tmp_path.iterdir()
    monkeypatch.setattr(prefix_cache, "open", refuse, raising=False)
    monkeypatch.setattr(Path, "unlink", refuse)
    rig.run("b" * 25 + "?", pin_length=25)
    assert [rig.run(letter * 25 + "!").usage.cached_tokens for letter in "ab"] == [0, 24]
    assert list(tmp_path.iterdir()) == [old] and f"{old} was not removed" in caplog.text


def test_active_slots_are_contiguous_and_idle_ones_are_used_in_turn() -> None:
    table, nothing = SlotTable(4, 64), np.arange(30, dtype=np.int32)
    taken = []
    for i in range(3):
        slot = table.choose(nothing + 100 * i, "")
        assert slot is not None
        table.acquire(slot, "")
        table.extend(slot, nothing + 100 * i)
        taken.append(slot)
    assert taken == [0, 1, 2]
    table.release(1)
    assert table.choose(nothing + 900, "") == 1, "the gap is filled first"
    table.release(0)
    table.release(2)
    assert table.choose(nothing + 900, "") == 3, "an empty slot before one that may still be of use"
    table.acquire(3, "")
    assert table.choose(nothing + 100, "") == 1, "the longest common prefix before all else"
    assert table.choose(nothing + 900, "") == 2
    for slot in range(3):
        table.acquire(slot, "")
    assert table.choose(nothing, "") is None


def test_adapters_share_no_prefix_with_each_other_or_the_plain_model(rigs: list[Rig]) -> None:
    rig = rig_of(rigs, 4)
    cached = []
    for lora in ("", "red", "blue"):
        fields = {"lora": lora} if lora else {}
        cached.append(rig.run(SYSTEM + "Hello", **fields).usage.cached_tokens)
        cached.append(rig.run(SYSTEM + "Hello there", **fields).usage.cached_tokens)
    same = _aligned(len(SYSTEM + "Hello"))
    assert cached == [0, same, 0, same, 0, same]


def test_a_session_that_changes_its_adapter_starts_anew_in_its_slot(rigs: list[Rig]) -> None:
    rig = rig_of(rigs, 1)
    for lora in ("red", "blue", "red"):
        assert rig.run(SYSTEM + "Hello", session_id="s", lora=lora).usage.cached_tokens == 0
    assert rig.run(SYSTEM + "Hello", session_id="s", lora="red").usage.cached_tokens > 0


def test_without_the_prefix_cache_each_sequence_keeps_its_adapter(rigs: list[Rig]) -> None:
    rig = rig_of(rigs, 2, prefix_cache=False)
    for lora in ("red", "blue"):
        assert rig.run(SYSTEM + "Hello", 8, lora=lora).usage.cached_tokens == 0


def test_a_prefix_is_copied_only_from_a_busy_slot_of_the_same_adapter(rigs: list[Rig]) -> None:
    rig, ready = rig_of(rigs, 3), threading.Event()
    rig.executor.before_step = lambda batch: _check(ready.wait(WAIT_S))
    running = [rig.engine.submit(rig.job(SYSTEM + name, 20, lora=name)) for name in ("red", "blue")]
    plain = rig.engine.submit(rig.job(SYSTEM + "plain", 20))
    ready.set()
    for name, index, generation in (("red", 1, running[0]), ("blue", 2, running[1]), ("plain", 0, plain)):
        tokens = list(generation.result(WAIT_S).token_ids)
        assert tokens == reference_greedy((SYSTEM + name).encode(), len(tokens), BYTE_VOCAB, 128, index)
    assert rig.executor.copies == []


def test_a_pinned_prefix_belongs_to_its_adapter_also_on_disk(rigs: list[Rig], tmp_path: Path) -> None:
    first = rig_of(rigs, 1, PinnedStore(1000, tmp_path, "model"))
    first.run(SYSTEM + "one", pin_length=len(SYSTEM), lora="red")
    first.run(SYSTEM + "one", pin_length=len(SYSTEM))
    assert len(list(tmp_path.iterdir())) == 2 and len(first.executor.saves) == 2
    again = rig_of(rigs, 1, PinnedStore(1000, tmp_path, "model"))
    assert again.run(SYSTEM + "two", lora="blue").usage.cached_tokens == 0
    assert again.run(SYSTEM + "two", lora="red").usage.cached_tokens == _aligned(len(SYSTEM))
    assert again.run(SYSTEM + "two").usage.cached_tokens == _aligned(len(SYSTEM))
    assert len(again.executor.loads) == 2


def test_an_adapter_that_is_not_loaded_is_refused_with_those_that_are(rigs: list[Rig]) -> None:
    with pytest.raises(RequestError, match="lora is 'green'; loaded are: blue, red"):
        rig_of(rigs).engine.submit(rigs[0].job("Hello", lora="green"))


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [([], [], 0), ([1], [], 0), ([1], [1], 1), ([1, 2], [1, 3], 1), ([1, 2], [1, 2, 3], 2), ([2], [1], 0)],
)
def test_common_prefix(a: list[int], b: list[int], length: int) -> None:
    assert common_prefix(np.array(a, np.int32), np.array(b, np.int32)) == length
