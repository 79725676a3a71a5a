"""In which order a benchmark runs: for each executor and batch size the engine and the executor alone, in turns.

That takes two copies of the model, so that a slow moment of the machine meets both; where only one fits into the
memory, the engine comes first and the executor alone after it.

What is measured is put into `Benchmark.runs` at once, so that an interrupted benchmark still has something to show.
"""

from __future__ import annotations

import contextlib
import time
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
from edgellm_ros.benchmark.random_bundle import RandomBundle
from edgellm_ros.benchmark.ratios import measure_ratios
from edgellm_ros.benchmark.read_bandwidth import ReadBandwidth, measure_read_bandwidth
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import SamplingParams
from edgellm_ros.errors import ConfigError
from edgellm_ros.executors.base import ON_GPU, Executor, ExecutorInfo
from edgellm_ros.executors.cuda_tiles import MAX_BATCH
from edgellm_ros.executors.native_executor import NativeExecutor
from edgellm_ros.llm import LLM
from edgellm_ros.memory import available_memory

# ONNX Runtime's threads go on asking for work for up to 20 ms after a step, on processors that the other copy needs.
_SPIN_S = 0.03


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
        self.capacity = self._plan_capacity()  # tokens of a slot, in every run
        self.runs: list[Run] = []

    def measure(self, progress: Callable[[str], object]) -> None:
        """Measure everything; `progress` gets a few words before each of `Plan.num_units` pieces of work."""
        for executor in self._plan.executors:
            read: ReadBandwidth | None = None
            for batch in self._plan.batches:
                config = replace(
                    self._plan.config,
                    executor=executor,
                    max_slots=batch,
                    max_queue=batch,
                    max_context=self.capacity,
                )
                read = self._measure_run(config, read, progress)

    def _measure_run(
        self, config: EngineConfig, read: ReadBandwidth | None, progress: Callable[[str], object]
    ) -> ReadBandwidth:
        """One executor and batch size; `read` is None in an executor's first run, which measures it, and prompts."""
        # Asking a GPU makes a context, which is the process's memory and fails where the GPU is full.
        free = free_device_bytes() if config.executor != "onnxruntime" else None
        progress(f"loading {self._model.name}")
        with LLM.open(self._source, config) as llm:
            check_batches((config.max_slots,), llm.info.name)  # what auto has chosen
            run = self._begin_run(llm, config.max_slots, with_prefill=read is None)
            self.runs.append(run)
            # Touches all memory that will be used.
            engine_path.cache_prompts(llm, self._prompts(run.batch).tolist(), self._plan.sampling)
            run.resident_bytes, run.peak_bytes = resident_bytes()
            if run.info.on_gpu and free is not None:
                taken = free - (free_device_bytes() or 0)
                run.device_bytes = taken if taken > 0 else None  # another process gave back more meanwhile
            if read is None:
                progress("read bandwidth of the memory")
                read = measure_read_bandwidth(run.info.name, config.num_threads)
            run.read = read
            run.interleaved = fits_twice(run.info)
            if run.interleaved:
                with self._executor(config, progress) as executor:
                    self._measure_figures(run, llm, executor, progress)
            else:
                self._measure_figures(run, llm, None, progress)
        if not run.interleaved:
            with self._executor(config, progress) as executor:
                self._measure_figures(run, None, executor, progress)
        return read

    def _begin_run(self, llm: LLM, batch: int, with_prefill: bool) -> Run:
        """The run's figures without any measurement."""
        plan, model, info = self._plan, self._model, llm.info
        weights = decode_bytes(model, self._bundle.manifest.quantization, info.name)
        run = Run(info, batch, llm.load_s)
        for length in plan.prompt_tokens if with_prefill else ():
            run.prefill.append(Prefill(length, prefill_flops(model, length)))
        for context in plan.contexts:
            cache = batch * kv_bytes(model, info.kv_bytes_per_token, context + plan.new_tokens / 2)
            read = weights * (1 if info.batches else batch)
            run.decode.append(Decode(batch, context, plan.new_tokens, read + cache))
        return run

    def _measure_figures(
        self, run: Run, llm: LLM | None, executor: Executor | None, progress: Callable[[str], object]
    ) -> None:
        """All rounds with the engine, the executor, or both in turns; the first round of each figure warms up."""
        plan, name, chunk = self._plan, run.info.name, self._plan.config.prefill_chunk
        pause_s = _SPIN_S if run.interleaved and not run.info.on_gpu else 0.0

        def begin(words: str) -> None:
            progress(words)
            time.sleep(pause_s)

        if executor is not None:
            run.planned_parts = planned_parts(executor)
        for prefill in run.prefill:
            length = prefill.prompt_tokens
            for i in range(plan.rounds + 1):
                ids = self._random_ids((length,), length, i)
                if llm is not None:
                    begin(f"{name}: first token after {length} tokens")
                    ms = engine_path.time_first_token(llm, ids.tolist(), plan.sampling)
                    prefill.first_token_ms += [ms] if i else []
                if executor is not None:
                    begin(f"{name}: prompt of {length} tokens, executor")
                    ms = executor_path.time_prompt(executor, ids, chunk)
                    prefill.executor_ms += [ms] if i else []
        computed = 0
        for decode in run.decode:
            prompts = self._prompts(run.batch)[:, : decode.context]
            words = f"{name}: decoding {run.batch} x {plan.new_tokens} tokens after {decode.context}"
            for i in range(plan.rounds + 1):
                if llm is not None:
                    begin(f"{words}, engine")
                    if not i:
                        engine_path.cache_prompts(llm, prompts.tolist(), plan.sampling)
                    ms = engine_path.time_decode(llm, prompts.tolist(), plan.new_tokens, plan.sampling)
                    decode.engine_ms += [ms] if i else []
                if executor is not None:
                    begin(f"{words}, executor")
                    if not i:  # what the shorter context left is the start of this one
                        for slot, ids in enumerate(prompts):
                            executor_path.compute_prompt(executor, slot, ids, computed, chunk)
                        computed = decode.context
                    ms = executor_path.time_decode(executor, run.batch, decode.context, plan.new_tokens)
                    decode.executor_ms += [ms] if i else []
        if isinstance(executor, NativeExecutor) and executor.run is not None:
            steps = (plan.contexts[0], plan.new_tokens, plan.rounds)
            run.ratios = measure_ratios(executor, executor.decoder, run.batch, *steps, plan.sampling)

    @contextlib.contextmanager
    def _executor(self, config: EngineConfig, progress: Callable[[str], object]) -> Iterator[Executor]:
        """The model without the engine."""
        progress(f"loading {self._model.name} again, without the engine")
        executor = executors.create_executor(self._bundle, config)
        try:
            yield executor
        finally:
            executor.close()

    def _plan_capacity(self) -> int:
        plan, limit = self._plan, self._model.max_context
        longest = tokens_needed(max(plan.contexts), plan.new_tokens, max(plan.batches))
        needed = max(longest, max(plan.prompt_tokens) + 1)
        shape = f"--shape {self._bundle.shape}" if isinstance(self._bundle, RandomBundle) else ""
        if shape and plan.config.max_context > limit:  # loading would ask for another export
            raise ConfigError(f"max_context {plan.config.max_context} exceeds the {limit} of {shape}; lower it")
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
                f"--new-tokens and --batch), but {shape or 'the bundle'} holds {limit}; lower them"
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
    most = MAX_BATCH if module is None else module.MAX_BATCH  # which a module older than this file may lack
    if executor in ON_GPU and max(batches) > most:
        raise ConfigError(f"--batch {max(batches)} is more than the {executor} executor decodes at once, {most}")


def planned_parts(executor: Executor) -> dict[str, int] | None:
    """Bytes of `executor`'s planned memory by purpose; None where it plans only their sum, as onnxruntime does."""
    plan: dict[str, int] | None = getattr(executor, "memory_plan", None)
    return None if plan is None else {name: size for name, size in plan.items() if name != "total"}


def fits_twice(info: ExecutorInfo) -> bool:
    """Whether what `info` describes, which is loaded, fits once more into the memory that is free now."""
    free = (free_device_bytes() or 0) if info.on_gpu else available_memory()
    return 1.25 * info.memory_bytes < free
