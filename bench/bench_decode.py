"""Decode and prefill of the CUDA executor on random weights, beside the memory's read speed and torch.compile.

    python3 bench/bench_decode.py --shape llama-1b llama-8b --weights bf16 int4 --torch

One sequence decodes greedily on the device from `--context` on; ms/token is the host's clock over all tokens of
`decode_tokens`, "device" the median between two steps on the GPU. The share is the weights' and the cache's bytes over
that time, in relation to what a kernel that only reads reaches in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from gpu_or_exit import load_module, run_script  # noqa: E402

from edgellm_ros.benchmark.costs import decode_bytes, kv_bytes  # noqa: E402
from edgellm_ros.benchmark.executor_path import time_decode, time_prompt  # noqa: E402
from edgellm_ros.benchmark.random_bundle import SCHEMES, SHAPES, RandomBundle  # noqa: E402
from edgellm_ros.benchmark.tuning import tune  # noqa: E402
from edgellm_ros.config import EngineConfig  # noqa: E402
from edgellm_ros.executors import SequenceStep  # noqa: E402
from edgellm_ros.executors.cuda import CudaExecutor  # noqa: E402
from edgellm_ros.executors.cuda_tiles import MAX_BATCH  # noqa: E402


@dataclasses.dataclass
class Result:
    """One line of the table."""

    shape: str
    weights: str
    precision: str  # of weights and KV cache
    batch: int
    context: int
    ms_per_token: float  # host clock, sampling included
    device_ms: float  # median step
    sampled_ms: float  # the same with temperature, top-k and top-p
    plain_ms: float  # kernels launched one by one instead of as a graph
    host_ms: float  # logits to the host and the largest taken there, a step at a time: what Executor.step costs
    gb_per_s: float
    share: float  # of the read bandwidth
    prefill_ms: dict[int, float]
    torch_ms: float  # of one sequence, whatever the batch; 0: not measured
    load_s: float
    memory_mb: float
    tiles: dict[str, int]  # that --tune chose
    untuned_ms: float  # device_ms before --tune; 0 without it


def main() -> None:
    """Measure what the options ask for, one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llama-1b", "qwen3-4b", "llama-8b"])
    parser.add_argument("--weights", nargs="+", choices=SCHEMES, default=["bf16", "int8", "int4"])
    parser.add_argument(
        "--batch", nargs="+", type=_batch, default=[1], metavar="N",
        help=f"sequences that decode together, 1 to {MAX_BATCH}",
    )  # fmt: skip
    parser.add_argument("--context", nargs="+", type=int, default=[512])
    parser.add_argument("--batching", choices=("fast", "exact"), default="fast", help="EngineConfig.decode_batching")
    parser.add_argument("--kv-cache", choices=("auto", "bf16", "fp16", "fp8"), default="auto", help="EngineConfig's")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prefill", nargs="*", type=int, default=[512, 2048])
    parser.add_argument("--torch", action="store_true", help="torch.compile too: bf16, one sequence (a minute a shape)")
    parser.add_argument("--tune", action="store_true", help="search the tile of every decode product first")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    module = load_module()
    info = module.device_info()
    bandwidth = module.measure_read_bandwidth(1 << 31)
    if not options.json:
        print(f"{info['name']}, {info['num_sms']} SMs; read-only kernel {bandwidth:.0f} GB/s; "
              f"{options.tokens} tokens, decode_batching {options.batching}")  # fmt: skip
    results = []
    for shape in options.shape:
        for context in options.context:
            torch_ms = _torch_ms(shape, context, options.tokens) if options.torch else 0.0
            for weights, batch in itertools.product(options.weights, options.batch):
                result = measure(shape, weights, batch, context, bandwidth, torch_ms, options)
                results.append(result)
                if not options.json:
                    print_result(result)
    if options.json:
        print(json.dumps({"device": info["name"], "read_gb_per_s": bandwidth,
                          "results": [dataclasses.asdict(r) for r in results]}))  # fmt: skip


def measure(
    shape: str, weights: str, batch: int, context: int, bandwidth: float, torch_ms: float, options: Any
) -> Result:
    """Load one random bundle and time it."""
    module = load_module()
    bundle = RandomBundle(shape, weights)
    longest = max([context, *options.prefill])
    capacity = -(-(longest + 3 * options.tokens + 64) // 64) * 64
    slots = batch if options.batching == "fast" else max(batch, 2)  # alone, exact has nothing to be exact about
    config = EngineConfig(
        max_slots=slots, max_context=capacity, kv_cache=options.kv_cache, prefill_chunk=min(longest, 2048),
        decode_batching=options.batching,
    )  # fmt: skip
    started = time.monotonic()
    executor = CudaExecutor(bundle, config)
    load_s = time.monotonic() - started
    ids = np.random.default_rng(1).integers(0, bundle.manifest.model.vocab_size, longest).astype(np.int32)
    prefill_ms = {length: _time_prefill(executor, ids[:length], config.prefill_chunk) for length in options.prefill}
    for slot in range(batch):
        executor.step([SequenceStep(slot, ids[:context], 0)])
    decoder: Any = executor._decoder
    at = ([*range(batch)], [context] * batch, [7] * batch)
    untuned_ms = statistics.median(decoder.time_run(*at, options.tokens)) if options.tune else 0.0
    tiles = {c.product: c.tile for c in tune(decoder, batch, context)} if options.tune else {}
    executor.decode_tokens(*at, 16)
    ms = statistics.median(time_decode(executor, batch, context, options.tokens) for _ in range(3))
    device_ms = statistics.median(decoder.time_run(*at, options.tokens))
    rows = [module.SamplingRow(seed=i, temperature=0.8, top_k=40, top_p=0.95) for i in range(batch)]
    sampled_ms = statistics.median(decoder.time_run(*at, options.tokens, rows))
    decoder.use_graphs(False)
    plain_ms = statistics.median(decoder.time_run(*at, 32))
    decoder.use_graphs(True)
    host_ms = _time_host_steps(executor, batch, context)
    model = bundle.manifest.model
    read = decode_bytes(model, bundle.manifest.quantization)
    read += batch * kv_bytes(model, executor.info.kv_bytes_per_token, context + options.tokens // 2)
    gb_per_s = read / ms * 1e-6
    memory_mb, precision = executor.info.memory_bytes / 1e6, executor.info.precision
    executor.close()
    del executor, decoder
    gc.collect()
    return Result(shape, weights, precision, batch, context, ms, device_ms, sampled_ms, plain_ms, host_ms, gb_per_s,
                  gb_per_s / bandwidth, prefill_ms, torch_ms, load_s, memory_mb, tiles, untuned_ms)  # fmt: skip


def print_result(r: Result) -> None:
    """One line, and the tiles under it."""
    prefill = ", ".join(f"{length}: {ms:.1f} ms" for length, ms in r.prefill_ms.items())
    peer = ""
    if r.torch_ms:  # a step of several sequences has no ratio to it
        ratio = f"{r.torch_ms / r.ms_per_token:.2f} x" if r.batch == 1 else "of one sequence"
        peer = f"; torch.compile bf16 {r.torch_ms:.3f} ({ratio})"
    print(
        f"{r.shape:9} {r.weights:8} batch {r.batch} context {r.context:5}  {r.ms_per_token:7.3f} ms/token (device "
        f"{r.device_ms:.3f}, sampled {r.sampled_ms:.3f}, no graph {r.plain_ms:.3f} = {r.plain_ms / r.device_ms:.2f} x, "
        f"drawn on the host {r.host_ms:.3f} = {r.host_ms / r.ms_per_token:.2f} x)  "
        f"{r.gb_per_s:5.0f} GB/s = {r.share:.0%}{peer}; prefill {prefill}; load {r.load_s:.1f} s, "
        f"{r.memory_mb:.0f} MB; {r.precision}",
        flush=True,
    )
    if r.tiles:
        print(f"{'':9} built-in tiles: device {r.untuned_ms:.3f}; chosen {r.tiles}", flush=True)


def _batch(text: str) -> int:
    """Raises ArgumentTypeError, which argparse shows, for what is no batch."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_BATCH:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: 1 to {MAX_BATCH}")
    return int(text)


def _time_prefill(executor: CudaExecutor, ids: np.ndarray, chunk: int) -> float:
    return statistics.median([time_prompt(executor, ids, chunk) for _ in range(5)][1:])


def _time_host_steps(executor: CudaExecutor, batch: int, context: int) -> float:
    tokens = np.full(batch, 7, np.int32)
    times = []
    for i in range(32):
        started = time.perf_counter()
        logits = executor.step([SequenceStep(s, tokens[s : s + 1], context + i) for s in range(batch)])
        tokens = logits.argmax(-1).astype(np.int32)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def _torch_ms(shape: str, context: int, num_tokens: int) -> float:
    from torch_decoder import time_torch_decode

    return time_torch_decode(SHAPES[shape], context, num_tokens)


if __name__ == "__main__":
    run_script(main)
