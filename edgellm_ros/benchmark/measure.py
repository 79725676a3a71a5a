"""In which order a benchmark runs: for each executor and batch size the engine first, as users load it, then alone.

What is measured is put into `Benchmark.runs` at once, so that an interrupted benchmark still has something to show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgellm_ros import executors, native
from edgellm_ros.benchmark import engine_path, executor_path
from edgellm_ros.benchmark.costs import decode_bytes, kv_bytes, prefill_flops
from edgellm_ros.benchmark.figures import Decode, Prefill, Run
from edgellm_ros.benchmark.machine import free_device_bytes, resident_bytes
from edgellm_ros.benchmark.read_bandwidth import ReadBandwidth, measure_read_bandwidth
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import SamplingParams
from edgellm_ros.errors import ConfigError
from edgellm_ros.executors.base import Executor
from edgellm_ros.llm import LLM


@dataclass(frozen=True)
class Plan:
    """What to measure. `config` says how a model is loaded; its executor, slots and context come from the rest."""

    executors: tuple[str, ...]
    prompt_tokens: tuple[int, ...]
    contexts: tuple[int, ...]  # ascending
    batches: tuple[int, ...]
    new_tokens: int
    rounds: int
    config: EngineConfig
    sampling: SamplingParams

    @property
    def num_units(self) -> int:
        """How often `progress` is called."""
        rounds = 2 * (self.rounds + 1)
        per_executor = len(self.prompt_tokens) * rounds + 1
        per_run = len(self.contexts) * rounds + 2
        return len(self.executors) * (per_executor + len(self.batches) * per_run)


def tokens_needed(context: int, new_tokens: int, batch: int) -> int:
    """Tokens that a slot must hold to decode `new_tokens` after `context` while `batch` sequences start in turn."""
    return context + new_tokens + batch + 1


class Benchmark:
    """A bundle and a plan. Raises ConfigError for what cannot be measured, before anything is loaded."""

    def __init__(self, bundle: Bundle, source: Path | Bundle, plan: Plan) -> None:
        """`source` is what is loaded: a path, whose files are then verified, or a bundle that has none."""
        self._bundle, self._source, self._plan = bundle, source, plan
        self._model = bundle.manifest.model
        self._capacity = self._plan_capacity()
        self.runs: list[Run] = []

    def measure(self, progress: Callable[[str], object]) -> None:
        """Measure everything; `progress` gets a few words before each of `Plan.num_units` pieces of work."""
        for executor in self._plan.executors:
            read: ReadBandwidth | None = None
            for index, batch in enumerate(self._plan.batches):
                config = replace(
                    self._plan.config,
                    executor=executor,
                    max_slots=batch,
                    max_queue=batch,
                    max_context=self._capacity,
                )
                run = self._measure_engine(config, index == 0, progress)
                if read is None:
                    progress("read bandwidth of the memory")
                    read = measure_read_bandwidth(run.info.name, config.num_threads)
                run.read = read
                self._measure_executor(config, run, progress)

    def _measure_engine(self, config: EngineConfig, with_prefill: bool, progress: Callable[[str], object]) -> Run:
        plan, model = self._plan, self._model
        free = free_device_bytes()
        progress(f"loading {model.name}")
        with LLM.open(self._source, config) as llm:
            info, batch = llm.info, config.max_slots
            run = Run(info, batch, llm.load_s)
            self.runs.append(run)
            if info.name == "cuda" and free is not None:
                run.device_bytes = free - (free_device_bytes() or 0)
            weights = decode_bytes(model, self._bundle.manifest.quantization, info.name)
            if with_prefill:
                for length in plan.prompt_tokens:
                    figure = Prefill(length, prefill_flops(model, length))
                    run.prefill.append(figure)
                    for i in range(plan.rounds + 1):
                        progress(f"{info.name}: first token after {length} tokens")
                        ids = self._random_ids((length,), length, i).tolist()
                        ms = engine_path.time_first_token(llm, ids, plan.sampling)
                        if i:  # the first one warms up
                            figure.first_token_ms.append(ms)
            prompts = self._prompts(batch)
            for context in plan.contexts:
                cache = batch * kv_bytes(model, info.kv_bytes_per_token, context + plan.new_tokens / 2)
                decode = Decode(batch, context, plan.new_tokens, weights + cache)
                run.decode.append(decode)
                started = [ids[:context].tolist() for ids in prompts]
                for i in range(plan.rounds + 1):
                    progress(f"{info.name}: decoding {batch} x {plan.new_tokens} tokens after {context}, engine")
                    if not i:
                        engine_path.cache_prompts(llm, started, plan.sampling)
                    ms = engine_path.time_decode(llm, started, plan.new_tokens, plan.sampling)
                    if i:
                        decode.engine_ms.append(ms)
            run.resident_bytes, run.peak_bytes = resident_bytes()
        return run

    def _measure_executor(self, config: EngineConfig, run: Run, progress: Callable[[str], object]) -> None:
        plan = self._plan
        progress(f"loading {self._model.name} again, without the engine")
        with _executor(self._bundle, config) as executor:
            for figure in run.prefill:
                ids = self._random_ids((figure.prompt_tokens,), figure.prompt_tokens)
                for i in range(plan.rounds + 1):
                    progress(f"{run.info.name}: prompt of {figure.prompt_tokens} tokens")
                    ms = executor_path.time_prompt(executor, ids, config.prefill_chunk)
                    if i:
                        figure.executor_ms.append(ms)
            computed = 0
            prompts = self._prompts(run.batch)
            for decode in run.decode:
                for i in range(plan.rounds + 1):
                    progress(f"{run.info.name}: decoding {run.batch} x {plan.new_tokens} tokens after {decode.context}")
                    if not i:  # what the shorter context left is the start of this one
                        for slot, ids in enumerate(prompts):
                            prompt = ids[: decode.context]
                            executor_path.compute_prompt(executor, slot, prompt, computed, config.prefill_chunk)
                        computed = decode.context
                    ms = executor_path.time_decode(executor, run.batch, decode.context, plan.new_tokens)
                    if i:
                        decode.executor_ms.append(ms)

    def _plan_capacity(self) -> int:
        plan, limit = self._plan, self._model.max_context
        longest = tokens_needed(max(plan.contexts), plan.new_tokens, max(plan.batches))
        needed = max(longest, max(plan.prompt_tokens) + 1)
        if plan.config.max_context:
            if needed > plan.config.max_context:
                raise ConfigError(
                    f"max_context {plan.config.max_context} is too small for what is to be measured, which needs "
                    f"{needed} tokens; raise it, or lower --prompt-tokens, --context, --new-tokens or --batch"
                )
            return plan.config.max_context
        if needed > limit:
            raise ConfigError(
                f"what is to be measured needs {needed} tokens (the longest of --prompt-tokens, and --context with "
                f"--new-tokens and --batch), but the bundle holds {limit}; lower them"
            )
        return min(-(-needed // 64) * 64, limit)

    def _prompts(self, batch: int) -> npt.NDArray[np.int32]:
        """(batch, longest context) token ids: a shorter context's are the start of a longer one's."""
        return self._random_ids((batch, self._plan.contexts[-1]))

    def _random_ids(self, shape: tuple[int, ...], *seeds: int) -> npt.NDArray[np.int32]:
        return np.random.default_rng(seeds).integers(0, self._model.vocab_size, shape).astype(np.int32)


def check_batches(batches: tuple[int, ...], executor: str) -> None:
    """Raise ConfigError for a batch that a run on the device of `executor` cannot hold."""
    module, _ = native.import_module()
    if executor == "cuda" and module is not None and max(batches) > module.MAX_BATCH:
        raise ConfigError(f"--batch {max(batches)} is more than the cuda executor decodes at once, {module.MAX_BATCH}")


@contextlib.contextmanager
def _executor(bundle: Bundle, config: EngineConfig) -> Iterator[Executor]:
    executor = executors.create_executor(bundle, config)
    try:
        yield executor
    finally:
        executor.close()
