"""What a benchmark times: the steps of an engine, of an executor alone and of a reading program, and nothing else."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_bundle import serve_with_fakes, write_bundle
from doubles import FakeExecutor
from run_double import RunFakeExecutor

from edgellm_ros.benchmark import engine_path, executor_path, ratios, read_bandwidth
from edgellm_ros.benchmark.report import ratios_line
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import FinishReason, SamplingParams
from edgellm_ros.errors import DeviceError
from edgellm_ros.executors import SequenceStep
from edgellm_ros.llm import LLM


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def pass_ms(self, ms: float) -> None:
        self.now += ms * 1e-3


@pytest.mark.parametrize("passes_ms", [(40, 8, 4, 16, 4), (4, 8, 8, 8, 8)])
def test_the_cpus_read_bandwidth_is_that_of_the_best_pass_and_names_its_method(
    passes_ms: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of the test's, which moves between the two looks at it of a pass."""

    class Passes(Clock):
        looks = 0

        def perf_counter(self) -> float:
            if self.looks % 2:
                self.pass_ms(passes_ms[self.looks // 2])
            self.looks += 1
            return self.now

    monkeypatch.setattr(read_bandwidth, "time", Passes())
    monkeypatch.setattr(read_bandwidth, "available_memory", lambda: 4 * (8 << 20) + 3)
    found = read_bandwidth.measure_read_bandwidth("onnxruntime", num_threads=3)
    assert found.gb_per_s == pytest.approx((8 << 20) / 4e-3 / 1e9)
    assert found.method == "NumPy sums of 8 MiB in 3 threads, best of 5"


@pytest.mark.parametrize(("length", "starts"), [(64, [0]), (65, [0, 56]), (200, [0, 64, 128, 192])])
def test_an_executors_prompt_is_computed_as_a_whole_in_the_engines_chunks(
    length: int, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of the test's: a step takes 3 ms. A chunk begins at a multiple of 8, and none has one token."""
    clock = Clock()
    monkeypatch.setattr(executor_path, "time", clock)
    executor = FakeExecutor(1, 256, before_step=lambda steps: clock.pass_ms(3))
    ids = np.arange(length, dtype=np.int32)
    assert executor_path.time_prompt(executor, ids, 64) == pytest.approx(3.0 * len(starts))
    steps = [step for (step,) in executor.calls]
    assert [step.position for step in steps] == starts
    assert np.array_equal(np.concatenate([step.token_ids for step in steps]), ids)
    assert [step.num_logits for step in steps] == [0] * (len(starts) - 1) + [1], "of the last token only"


@pytest.mark.parametrize("batch", [1, 3])
def test_the_engines_time_is_that_of_its_steps_however_many_sequences_share_them(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of the test's: a step takes 5 ms and gives every sequence a token, so 5 ms each."""
    clock = Clock()
    monkeypatch.setattr(engine_path, "time", clock)
    made = serve_with_fakes(monkeypatch, before_step=lambda steps: clock.pass_ms(5))
    sampling = SamplingParams(ignore_eos=True, seed=0)
    prompts = [[20 + i] * 40 for i in range(batch)]
    with LLM.open(write_bundle(tmp_path / "bundle"), EngineConfig(max_slots=batch)) as llm:
        engine_path.cache_prompts(llm, prompts, sampling)
        made[0].calls.clear()
        ms = engine_path.time_decode(llm, prompts, 10, sampling)
        full = [call for call in made[0].calls if len(call) == batch and all(len(s.token_ids) == 1 for s in call)]
        assert 9 <= len(full) <= 10 + batch  # all sequences in one step, most of the time
        assert ms == pytest.approx(5.0)
        assert engine_path.time_first_token(llm, [7] * 30, sampling) == pytest.approx(5.0)


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt", "cuda"])
def test_the_step_of_the_first_token_is_in_neither_clock(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of the test's: the step that an engine begins with takes 100 ms, every other one 2 ms."""
    clock = Clock()
    monkeypatch.setattr(executor_path, "time", clock)
    monkeypatch.setattr(ratios, "time", clock)

    class Executor(RunFakeExecutor):
        def decode_tokens(self, slots: list[int], positions: list[int], first: list[int], num_steps: int) -> None:
            assert positions == [20, 20]
            clock.pass_ms(2 * num_steps)

    executor = Executor(num_slots=2, capacity=64)
    executor.step([SequenceStep(slot, np.full(20, 7, np.int32), 0) for slot in range(2)])
    executor.info = dataclasses.replace(executor.info, name=name)
    executor.before_step = lambda steps: clock.pass_ms(100 if steps[0].position == 19 else 2)
    executor.run.hook = lambda word: clock.pass_ms(2) if word == "launch" else None
    assert executor_path.time_decode(executor, 2, 20, 4) == pytest.approx(2.0)
    assert clock.now == pytest.approx(0.108)


def test_executor_and_engine_are_timed_over_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = serve_with_fakes(monkeypatch)
    sampling = SamplingParams(ignore_eos=True, seed=0)
    bundle = write_bundle(tmp_path / "bundle")
    with LLM.open(bundle, EngineConfig(max_slots=1)) as llm:
        engine_path.cache_prompts(llm, [[20] * 40], sampling)
        made[0].calls.clear()
        engine_path.time_decode(llm, [[20] * 40], 10, sampling)
    executor = FakeExecutor(1, 256)
    executor.step([SequenceStep(0, np.full(40, 20, np.int32), 0)])
    executor.calls.clear()
    executor_path.time_decode(executor, 1, 40, 10)
    for first, *counted in (made[0].calls, executor.calls):  # the first gives token 1; an engine begins before it
        assert first[0].position + len(first[0].token_ids) == 40
        assert [(step.position, len(step.token_ids)) for step, in counted] == [(40 + i, 1) for i in range(10)]


def test_graphs_and_draws_on_the_device_are_compared_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of the test's: a launch takes 1 ms with graphs and 3 ms without, a step for the host 4 ms."""

    class Decoder:
        graphs = True

        def use_graphs(self, use: bool) -> None:
            self.graphs = use

    decoder, clock = Decoder(), Clock()
    monkeypatch.setattr(ratios, "time", clock)
    executor = RunFakeExecutor(num_slots=2, capacity=64, before_step=lambda steps: clock.pass_ms(4))
    executor.step([SequenceStep(slot, np.full(20, 7, np.int32), 0) for slot in range(2)])
    executor.run.hook = lambda word: clock.pass_ms(1 if decoder.graphs else 3) if word == "launch" else None
    found = ratios.measure_ratios(executor, decoder, 2, 20, 6, 3, SamplingParams(temperature=0.9, seed=1))
    assert decoder.graphs and set(executor.run.batches) == {(0, 1)}
    told = found.to_dict()
    assert told["graph_ms"]["rounds"] == pytest.approx([1.0] * 3)
    assert told["plain_launches_ms"]["rounds"] == pytest.approx([3.0] * 3)
    assert told["drawn_on_host_ms"]["rounds"] == pytest.approx([4.0] * 3)
    assert told["plain_launches_over_graph"] == pytest.approx(3.0) and told["host_over_device"] == pytest.approx(4.0)
    line = ratios_line(told)
    assert "plain launches take 3.00 x a graph's 1.000 ms" in line and "on the host takes 4.00 x the 1.000 ms" in line


def test_ctrl_c_ends_the_sequences_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def interrupt(batch: Any) -> None:
        steps.append(len(batch))
        time.sleep(0.002)
        if len(steps) == 20:
            os.kill(os.getpid(), signal.SIGINT)  # which Python handles in the main thread, the one that waits

    serve_with_fakes(monkeypatch, before_step=interrupt)
    sampling = SamplingParams(ignore_eos=True, seed=0)
    prompts = [[20] * 40, [30] * 40]
    with LLM.open(write_bundle(tmp_path / "bundle"), EngineConfig(max_slots=2)) as llm:
        engine_path.cache_prompts(llm, prompts, sampling)
        with pytest.raises(KeyboardInterrupt):
            engine_path.time_decode(llm, prompts, 200, sampling)
        assert llm.metrics().active == 0 and len(steps) < 200
        assert llm.metrics().finished[FinishReason.CANCELLED] == 2


def test_a_sequence_that_fails_is_an_error_and_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(steps: Any) -> None:
        if made and len(made[0].calls) > 6:
            raise DeviceError("the device fell off")

    made = serve_with_fakes(monkeypatch, before_step=fail)
    sampling = SamplingParams(ignore_eos=True, seed=0)
    with LLM.open(write_bundle(tmp_path / "bundle"), EngineConfig(max_slots=1)) as llm:
        engine_path.cache_prompts(llm, [[20] * 40], sampling)
        with pytest.raises(DeviceError, match="fell off"):
            engine_path.time_decode(llm, [[20] * 40], 50, sampling)
        with pytest.raises(DeviceError, match="fell off"):
            engine_path.time_first_token(llm, [20] * 40, sampling)
