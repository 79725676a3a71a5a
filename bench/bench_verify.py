"""Verifying a draft against decoding one token: what a draft may cost before speculation loses.

    python3 bench/bench_verify.py --shape llama-1b llama-8b --weights bf16 int4 --batching fast exact

More than 8 tokens have the matrix products of prompts where their weights allow that, others the decode kernels, 16 (in
exact mode 8) at a time. "device" times are medians between two steps on the GPU, without the copy of the logits to the
host; "host" is Executor.verify_tree's wall clock with it. A draft of n tokens pays when more than verify / decode of
its tokens are accepted.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from gpu_or_exit import load_module, run_script  # noqa: E402

from edgellm_ros.benchmark.random_bundle import SCHEMES, SHAPES, RandomBundle  # noqa: E402
from edgellm_ros.config import EngineConfig  # noqa: E402
from edgellm_ros.executors import SequenceStep, cuda  # noqa: E402
from edgellm_ros.executors.cuda import CudaExecutor  # noqa: E402


def main() -> None:
    """One line a shape, scheme, mode and context."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llama-1b", "llama-8b"])
    parser.add_argument("--weights", nargs="+", choices=SCHEMES, default=["bf16"])
    parser.add_argument("--batching", nargs="+", choices=("fast", "exact"), default=["fast"])
    parser.add_argument("--context", nargs="+", type=int, default=[512])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2, 4, 8, 9, 16, 32, 64], help="2 to 64 each")
    options = parser.parse_args()
    info = load_module().device_info()  # ends here without a GPU
    cuda._MAX_VERIFY_TOKENS = max(16, *options.tokens)
    print(f"{info['name']}, {info['num_sms']} SMs; ms, device median (host step)")
    for shape, weights, batching in itertools.product(options.shape, options.weights, options.batching):
        bundle = RandomBundle(shape, weights)
        slots = 1 if batching == "fast" else 2  # alone, exact has nothing to be exact about
        capacity = -(-(max(options.context) + 192) // 64) * 64
        config = EngineConfig(max_slots=slots, max_context=capacity, decode_batching=batching)
        executor = CudaExecutor(bundle, config)
        for context in options.context:
            measure(executor, f"{shape:9} {weights:8} {batching:5}", context, options.tokens)
        executor.close()
        del executor
        gc.collect()


def measure(executor: CudaExecutor, name: str, context: int, counts: list[int]) -> None:
    """Print one line: a decode step, then drafts of `counts` tokens."""
    decoder: Any = executor._decoder
    ids = np.random.default_rng(1).integers(0, executor.info.vocab_size, context).astype(np.int32)
    executor.step([SequenceStep(0, ids, 0)])
    decoder.time_run([0], [context], [7], 16)
    one = statistics.median(decoder.time_run([0], [context], [7], 64))
    columns = []
    for count in counts:
        decoder.time_verify(0, context, count, 8)
        device = statistics.median(decoder.time_verify(0, context, count, 48))
        host = _host_ms(executor, context, count)
        columns.append(f"verify {count}: {device:.3f} = {device / one:.2f} x ({host:.3f})")
    print(f"{name} context {context:5}  decode {one:.3f}; {'; '.join(columns)}", flush=True)


def _host_ms(executor: CudaExecutor, context: int, count: int) -> float:
    tokens, parents = np.full(count, 7, np.int32), np.arange(-1, count - 1, dtype=np.int32)
    times = []
    for _ in range(16):
        started = time.perf_counter()
        executor.verify_tree(0, context, tokens, parents)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    run_script(main)
