"""Times the executor alone: prompts and single tokens, without scheduling, sampling on the host, or text.

Where the executor can feed itself on the device (CUDA, TensorRT), tokens are greedy and the host reads one step behind;
elsewhere a step computes given tokens, and drawing the next one is no part of it. Decoding is timed over the steps that
an engine is timed over: those behind the one that gives the first token of a cached prompt.
"""

from __future__ import annotations

import time
from typing import cast

import numpy as np
import numpy.typing as npt

from edgellm_ros.benchmark.ratios import time_run
from edgellm_ros.core import SamplingParams
from edgellm_ros.executors.base import Executor, SequenceStep
from edgellm_ros.runtime.kv_cache import chunk_length

Tokens = npt.NDArray[np.int32]


def compute_prompt(executor: Executor, slot: int, ids: Tokens, start: int, chunk: int) -> None:
    """Compute ids[start:] into `slot`, at most `chunk` tokens a step, cut as the engine cuts a prompt."""
    while start < len(ids):
        end = start + chunk_length(len(ids) - start, chunk)
        executor.step([SequenceStep(slot, ids[start:end], start, int(end == len(ids)))])
        start = end


def time_prompt(executor: Executor, ids: Tokens, chunk: int) -> float:
    """Milliseconds to compute a prompt in slot 0, with the logits of its last token."""
    started = time.perf_counter()
    compute_prompt(executor, 0, ids, 0, chunk)
    return (time.perf_counter() - started) * 1e3


def time_decode(executor: Executor, batch: int, context: int, num_steps: int) -> float:
    """Milliseconds a step that gives slots 0 to batch - 1, with `context` tokens each, one more token each.

    One step before those is not counted, as an engine's is not: the first after a pause takes longer than the others.
    """
    repeat_last_tokens(executor, batch, context)
    if executor.info.name == "cuda":
        return _time_device_loop(executor, batch, context, num_steps)
    if executor.info.on_gpu:
        return time_run(executor, batch, context, num_steps, SamplingParams(temperature=0.0))
    tokens = np.random.default_rng(context).integers(0, executor.info.vocab_size, (num_steps, batch)).astype(np.int32)
    started = time.perf_counter()
    for i, row in enumerate(tokens):
        executor.step([SequenceStep(slot, row[slot : slot + 1], context + i) for slot in range(batch)])
    return (time.perf_counter() - started) * 1e3 / num_steps


def repeat_last_tokens(executor: Executor, batch: int, context: int) -> None:
    """Compute the last of the `context` tokens of slots 0 to batch - 1 again: what gives an engine its first token.

    It is another token than the prompt's: of what follows, only the time is looked at.
    """
    token = np.full(1, 7, np.int32)
    executor.step([SequenceStep(slot, token, context - 1) for slot in range(batch)])


def _time_device_loop(executor: Executor, batch: int, context: int, num_steps: int) -> float:
    from edgellm_ros.executors.cuda import CudaExecutor

    decoder = cast(CudaExecutor, executor)
    started = time.perf_counter()
    decoder.decode_tokens(list(range(batch)), [context] * batch, [7] * batch, num_steps)
    return (time.perf_counter() - started) * 1e3 / num_steps
