"""What a device that feeds itself saves: graphs against plain launches, tokens drawn there against on the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.benchmark.figures import Ratios
from edgellm_ros.core import SamplingParams
from edgellm_ros.executors.base import Executor, RunSequence, SequenceStep
from edgellm_ros.runtime.sampling import Sampler

_FIRST = 7  # the token that every sequence begins with
_NO_PROMPT = np.zeros(0, np.int32)


def measure_ratios(
    executor: Executor, decoder: Any, batch: int, context: int, num_steps: int, rounds: int, sampling: SamplingParams
) -> Ratios:
    """Time `num_steps` steps of each way in turns, after a round that is not counted.

    Slots 0 to `batch` - 1 hold `context` tokens. `decoder` is the native one, whose graphs can be switched off. Graphs
    and launches are compared by greedy steps, where a launch's cost shows most; the two ways to draw by `sampling`.
    """
    found = Ratios(context, num_steps)
    greedy = replace(sampling, temperature=0.0)

    def launched() -> float:
        decoder.use_graphs(False)
        try:
            return time_run(executor, batch, context, num_steps, greedy)
        finally:
            decoder.use_graphs(True)

    ways: list[tuple[list[float], Callable[[], float]]] = [
        (found.graph_ms, lambda: time_run(executor, batch, context, num_steps, greedy)),
        (found.plain_ms, launched),
        (found.device_ms, lambda: time_run(executor, batch, context, num_steps, sampling)),
        (found.host_ms, lambda: time_host_draws(executor, batch, context, num_steps, sampling)),
    ]
    for i in range(rounds + 1):
        for times, way in ways:
            ms = way()
            times += [ms] if i else []
    return found


def time_run(executor: Executor, batch: int, context: int, num_steps: int, sampling: SamplingParams) -> float:
    """Milliseconds a step of a run on the device, which the host reads one step behind."""
    run = executor.run
    assert run is not None, executor.info.name
    run.start([RunSequence(slot, context, [_FIRST], _NO_PROMPT, sampling, seed=slot) for slot in range(batch)])
    started = time.perf_counter()
    for i in range(num_steps):
        run.launch()
        if i:
            run.read()
    run.read()
    return (time.perf_counter() - started) * 1e3 / num_steps


def time_host_draws(executor: Executor, batch: int, context: int, num_steps: int, sampling: SamplingParams) -> float:
    """Milliseconds a step whose logits come to the host, which draws the tokens of the next."""
    info = executor.info
    samplers = [Sampler(replace(sampling, seed=slot), info.vocab_size, (), info.vocab_map) for slot in range(batch)]
    tokens: npt.NDArray[np.int32] = np.full(batch, _FIRST, np.int32)
    started = time.perf_counter()
    for i in range(num_steps):
        rows = executor.step([SequenceStep(slot, tokens[slot : slot + 1], context + i) for slot in range(batch)])
        tokens = np.array([sampler.draw(row) for sampler, row in zip(samplers, rows, strict=True)], np.int32)
    return (time.perf_counter() - started) * 1e3 / num_steps
