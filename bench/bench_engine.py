"""Decode speed through the engine, beside that of the executor alone, which it must equal: one executor, one run.

    python3 bench/bench_engine.py --shape llama-1b --weights bf16 int4-fp8

"run" is `CudaExecutor.decode_tokens`: nothing but launches and reads, one step behind. "engine" is what a caller gets:
requests through `LLM`, with scheduling, text, stop conditions and streaming to a thread for each sequence. "host" is
the engine without the device's sampling: logits cross to the host for every token. Rounds of the three take turns;
the median is shown. A greedy request, one with temperature, top-k and top-p, and one with a penalty and top
log-probabilities, which takes the larger sampling kernel; the run beside the last one draws without those.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1])]

from gpu_or_exit import load_module, run_script  # noqa: E402

from edgellm_ros.benchmark.engine_path import cache_prompts, time_decode  # noqa: E402
from edgellm_ros.benchmark.executor_path import repeat_last_tokens  # noqa: E402
from edgellm_ros.benchmark.random_bundle import SCHEMES, SHAPES, RandomBundle  # noqa: E402
from edgellm_ros.config import EngineConfig  # noqa: E402
from edgellm_ros.core import SamplingParams  # noqa: E402
from edgellm_ros.executors.cuda import CudaExecutor  # noqa: E402
from edgellm_ros.llm import LLM  # noqa: E402

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.0},
    "everything": {
        "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.1, "logprobs": 5,
    },
}  # fmt: skip


def main() -> None:
    """One line a shape, weights, batch and kind of request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llama-1b"])
    parser.add_argument("--weights", nargs="+", choices=SCHEMES, default=["bf16", "int4-fp8"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    info = load_module().device_info()
    print(f"{info['name']}; context {options.context}, {options.tokens} tokens a sequence, {options.rounds} rounds")
    for shape in options.shape:
        for weights in options.weights:
            for batch in options.batch:
                measure(shape, weights, batch, options)


def measure(shape: str, weights: str, batch: int, options: argparse.Namespace) -> None:
    """Load one random bundle and print its lines."""
    bundle = RandomBundle(shape, weights)
    capacity = -(-(options.context + options.tokens + 64) // 64) * 64
    config = EngineConfig(max_slots=batch, max_context=capacity, decode_batching="fast", self_test=False)
    executor = CudaExecutor(bundle, config)
    device_run = executor.run
    rng = np.random.default_rng(0)
    vocab = bundle.manifest.model.vocab_size
    prompts = [rng.integers(0, vocab, options.context).tolist() for _ in range(batch)]
    with LLM(bundle, config, executor) as llm:
        for kind, settings in KINDS.items():
            sampling = SamplingParams(seed=1, ignore_eos=True, **settings)
            rows = [_row(sampling, i) for i in range(batch)]
            times: dict[str, list[float]] = {"run": [], "engine": [], "host": []}
            for _ in range(options.rounds + 1):
                times["run"].append(_time_run(executor, batch, options, rows))
                times["engine"].append(_time_engine(llm, prompts, options, sampling))
                # The engine asks once a request where it is sampled.
                device_run.can_sample = lambda params: False  # type: ignore[method-assign, union-attr]
                times["host"].append(_time_engine(llm, prompts, options, sampling))
                del device_run.can_sample  # type: ignore[union-attr]
            ms = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first warms up
            speeds = ", ".join(f"{name} {ms[name]:.3f} ms ({1e3 * batch / ms[name]:.0f} tokens/s)" for name in ms)
            print(
                f"{shape:9} {weights:8} batch {batch} {kind:10} {speeds}; engine {ms['engine'] / ms['run']:.3f} x "
                f"the run, host {ms['host'] / ms['engine']:.2f} x the engine",
                flush=True,
            )
    del executor, device_run, llm
    gc.collect()


def _row(sampling: SamplingParams, seed: int) -> Any:
    return load_module().SamplingRow(
        seed=seed, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
    )


def _time_run(executor: CudaExecutor, batch: int, options: argparse.Namespace, rows: list[Any]) -> float:
    repeat_last_tokens(executor, batch, options.context)
    started = time.perf_counter()
    executor.decode_tokens(list(range(batch)), [options.context] * batch, [7] * batch, options.tokens, rows)
    return (time.perf_counter() - started) * 1e3 / options.tokens


def _time_engine(llm: LLM, prompts: list[list[int]], options: argparse.Namespace, sampling: SamplingParams) -> float:
    cache_prompts(llm, prompts, sampling)
    return time_decode(llm, prompts, options.tokens, sampling)


if __name__ == "__main__":
    run_script(main)
