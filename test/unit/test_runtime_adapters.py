"""Adapters come and go while the engine serves: no answer is ever given by another adapter than the one it named."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from doubles import BYTE_VOCAB, FakeExecutor, reference_greedy
from run_double import RunFakeExecutor
from runtime_steps import WAIT_S, Valve, until

from edgellm_ros.core import FinishReason, SamplingParams
from edgellm_ros.errors import DeviceError, EdgeLLMError, RequestError, ShuttingDownError
from edgellm_ros.runtime import engine as engine_module
from edgellm_ros.runtime.sequence import Job

RED, BLUE = 7, 9  # what tells the adapters' contents apart


def job(prompt: str, lora: str = "", max_tokens: int = 8) -> Job:
    return Job(tuple(prompt.encode()), SamplingParams(temperature=0.0, max_tokens=max_tokens), lora=lora)


def expected(prompt: str, adapter: int = 0, count: int = 8) -> tuple[int, ...]:
    return tuple(reference_greedy(prompt.encode(), count, BYTE_VOCAB, 128, adapter))


def test_an_adapter_is_loaded_between_steps_by_the_engines_thread_and_changes_no_running_answer(start: Any) -> None:
    executor = FakeExecutor(allowed=128)
    engine = start(executor)
    running = engine.submit(job("Hello", max_tokens=60))
    engine.load_adapter("red", RED)
    assert set(engine.adapters) == {"red"}
    assert engine.submit(job("Hello", "red")).result(WAIT_S).token_ids == expected("Hello", RED)
    assert engine.submit(job("Hello")).result(WAIT_S).token_ids == expected("Hello")
    assert running.result(WAIT_S).token_ids == expected("Hello", 0, 60)
    assert len(executor.threads) == 1


def test_an_adapter_comes_and_goes_while_steps_are_under_way_and_no_token_is_lost(start: Any) -> None:
    executor = RunFakeExecutor(2, allowed=128)
    engine = start(executor)
    works = (lambda: engine.load_adapter("red", RED), lambda: engine.unload_adapter("red"))
    for work, names in zip(works, ({"red"}, set()), strict=True):
        executor.run.hook = valve = Valve("read", 3)
        running = engine.submit(job("Hello", max_tokens=40))
        assert valve.held.wait(WAIT_S)  # two steps are under way
        worker = threading.Thread(target=work)
        worker.start()
        until(lambda: engine._errands)
        valve.opened.set()
        worker.join(WAIT_S)
        assert not worker.is_alive() and set(engine.adapters) == names
        assert running.result(WAIT_S).token_ids == expected("Hello", 0, 40)
    assert executor.run.num_computed == 2 * 39, "every token was used"


def test_an_idle_engine_loads_at_once_and_a_freed_place_is_the_next_ones(start: Any) -> None:
    engine = start(FakeExecutor(allowed=128))
    for name, contents in (("red", RED), ("blue", BLUE), ("red", RED)):
        engine.load_adapter(name, contents)
        assert engine.submit(job("Hi", name)).result(WAIT_S).token_ids == expected("Hi", contents)
        engine.unload_adapter(name)
        with pytest.raises(RequestError, match=f"lora is '{name}'; loaded are: none"):
            engine.submit(job("Hi", name))


def test_an_adapter_in_use_is_not_unloaded(start: Any) -> None:
    held, go = threading.Event(), threading.Event()

    def hold(batch: Any) -> None:
        held.set()
        assert go.wait(WAIT_S)

    engine = start(FakeExecutor(num_slots=1, allowed=128, before_step=hold))
    engine.load_adapter("red", RED)
    first = engine.submit(job("one", "red"))
    waiting = engine.submit(job("two", "red"))
    assert held.wait(WAIT_S)
    with pytest.raises(RequestError, match="adapter 'red' is used by 2 requests"):
        engine.unload_adapter("red")
    go.set()
    for generation, prompt in ((first, "one"), (waiting, "two")):
        assert generation.result(WAIT_S).token_ids == expected(prompt, RED)
    engine.unload_adapter("red")
    assert not engine.adapters
    for name in ("red", ""):
        with pytest.raises(RequestError, match="loaded are: none|has no name"):
            engine.unload_adapter(name)


def test_an_adapter_that_goes_while_a_request_is_prepared_is_refused_and_not_replaced_by_its_successor(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(FakeExecutor(allowed=128))
    engine.load_adapter("red", RED)
    make = engine_module.Sequence

    def exchange(*args: Any) -> Any:
        monkeypatch.setattr(engine_module, "Sequence", make)
        engine.unload_adapter("red")
        engine.load_adapter("blue", BLUE)  # into the same place
        return make(*args)

    monkeypatch.setattr(engine_module, "Sequence", exchange)
    with pytest.raises(RequestError, match="lora is 'red'; loaded are: blue"):
        engine.submit(job("Hello", "red"))
    assert engine.submit(job("Hello", "blue")).result(WAIT_S).token_ids == expected("Hello", BLUE)


def test_under_load_and_exchange_every_accepted_answer_is_its_own_adapters(start: Any) -> None:
    engine = start(FakeExecutor(allowed=128), max_queue=64)
    contents = {"red": RED, "blue": BLUE}
    faults: list[str] = []
    served = dict.fromkeys(contents, 0)
    stop = threading.Event()

    def ask(number: int) -> None:
        prompt = f"prompt {number}"
        answers = {name: expected(prompt, adapter) for name, adapter in contents.items()}
        while not stop.is_set():
            for name, answer in answers.items():
                try:
                    got = engine.submit(job(prompt, name)).result(WAIT_S)
                except RequestError:
                    continue
                served[name] += 1
                if got.token_ids != answer:
                    faults.append(f"{name} {number}")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        for name, adapter in contents.items():
            engine.load_adapter(name, adapter)
            time.sleep(0.01)
            while True:
                try:
                    engine.unload_adapter(name)
                    break
                except RequestError:
                    time.sleep(0.001)
    stop.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert not faults and min(served.values()) > 5


def test_what_is_wrong_with_an_adapter_goes_to_its_caller_and_the_engine_goes_on(start: Any) -> None:
    executor = FakeExecutor(allowed=128)

    def refuse(name: str) -> None:
        raise RequestError("it has rank 99")

    executor.before_load = refuse
    engine = start(executor)
    with pytest.raises(RequestError, match="rank 99"):
        engine.load_adapter("red", RED)
    assert not engine.adapters
    assert engine.submit(job("Hello")).result(WAIT_S).token_ids == expected("Hello")


def test_a_device_that_fails_while_loading_ends_the_engine_with_the_reason(start: Any) -> None:
    executor = FakeExecutor(allowed=128)

    def fail(name: str) -> None:
        raise DeviceError("the bus is gone")

    executor.before_load = fail
    engine = start(executor)
    with pytest.raises(DeviceError, match="the bus is gone"):
        engine.load_adapter("red", RED)
    engine._thread.join(WAIT_S)
    for call in (lambda: engine.submit(job("Hello")), lambda: engine.load_adapter("blue", BLUE)):
        with pytest.raises(DeviceError, match="failed earlier.*the bus is gone"):
            call()


@pytest.mark.parametrize("failure", [DeviceError("the bus is gone"), ValueError("the bus is gone")])
@pytest.mark.parametrize("place", ["the steps under way", "the first adapter"])
def test_everyone_who_waits_for_an_adapter_is_told_that_the_device_has_failed(
    start: Any, place: str, failure: Exception
) -> None:
    executor = RunFakeExecutor(2, allowed=128)
    valve = Valve("read", 2)

    def fail_in_step(event: str) -> None:
        if event == "read" and valve.opened.is_set():  # the step that is read before adapters are loaded
            raise failure
        valve(event)

    def fail_in_load(name: str) -> None:
        raise failure

    executor.run.hook = fail_in_step if place == "the steps under way" else valve
    executor.before_load = fail_in_load
    engine = start(executor)
    running = engine.submit(job("Hello", max_tokens=100))
    assert valve.held.wait(WAIT_S)
    told: list[Exception] = []

    def load(name: str) -> None:
        for call in (lambda: engine.load_adapter(name, RED), lambda: engine.submit(job("Hello"))):
            try:
                call()
            except Exception as error:
                told.append(error)

    loaders = [threading.Thread(target=load, args=(name,), daemon=True) for name in ("red", "blue")]
    for loader in loaders:
        loader.start()
    until(lambda: len(engine._errands) == len(loaders))
    valve.opened.set()
    for loader in loaders:
        loader.join(WAIT_S)
        assert not loader.is_alive()
    assert [type(error) for error in told] == [DeviceError] * 4
    assert all("the bus is gone" in str(error) for error in told)
    with pytest.raises(DeviceError, match="the bus is gone"):
        running.result(WAIT_S)
    engine._thread.join(WAIT_S)
    assert executor.closed == 1 and not executor.adapters


def test_closing_refuses_what_waits_to_be_loaded(start: Any) -> None:
    held, go = threading.Event(), threading.Event()

    def hold(batch: Any) -> None:
        held.set()
        assert go.wait(WAIT_S)

    engine = start(FakeExecutor(allowed=128, before_step=hold))
    running = engine.submit(job("Hello", max_tokens=100))
    assert held.wait(WAIT_S)
    errors: list[EdgeLLMError] = []

    def load() -> None:
        try:
            engine.load_adapter("red", RED)
        except EdgeLLMError as error:
            errors.append(error)

    loader, closer = threading.Thread(target=load), threading.Thread(target=engine.close)
    loader.start()
    until(lambda: engine._errands)
    closer.start()
    until(lambda: engine._closing)
    go.set()
    loader.join(WAIT_S)
    closer.join(WAIT_S)
    assert not loader.is_alive() and [type(error) for error in errors] == [ShuttingDownError]
    assert running.result(WAIT_S).finish_reason is FinishReason.CANCELLED
    with pytest.raises(ShuttingDownError):
        engine.load_adapter("blue", BLUE)
