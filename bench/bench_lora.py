"""What LoRA adapters cost: decode steps and prompts of random bundles, with none and with adapters of several ranks.

    python3 bench/bench_lora.py --shape llama-1b llama-8b --weights bf16 int4 --rank 8 16 64 --batch 1 8

"no room" is an executor without adapters (max_loras 0); rank 0 is the same step in one that could use them, where
no sequence does: the two must agree. The other ranks change all seven projections of every layer; with a batch, the
sequences use two adapters in turn. Device milliseconds, the median between two steps; the bytes are the adapters' own.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu_or_exit import load_module, run_script

from edgellm_ros.benchmark.random_bundle import SCHEMES, SHAPES, RandomBundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.executors import SequenceStep
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.executors.lora import LoraAdapter, LoraTensors
from edgellm_ros.manifest import ModelSpec

CONTEXT = 512


def shapes_of(model: ModelSpec) -> dict[str, tuple[int, int]]:
    """(in, out) of each projection."""
    hidden, wide = model.hidden_size, model.intermediate_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden),
        "gate_proj": (hidden, wide), "up_proj": (hidden, wide), "down_proj": (wide, hidden),
    }  # fmt: skip


def random_adapter(model: ModelSpec, rank: int, targets: list[str]) -> tuple[LoraAdapter, int]:
    """An adapter of every layer, whose tensors share memory, and the bytes that it takes on the device."""
    rng = np.random.default_rng(rank)
    tensors, num_bytes = [], 0
    for target in targets:
        cols, rows = shapes_of(model)[target]
        a = rng.standard_normal((rank, cols), np.float32) * np.float32(0.02)
        b = rng.standard_normal((rows, rank), np.float32) * np.float32(0.02)
        tensors += [LoraTensors(layer, target, a, b, 0.1) for layer in range(model.num_layers)]
        num_bytes += 2 * model.num_layers * rank * (cols + rows)
    return LoraAdapter(tuple(tensors), f"random {rank}"), num_bytes


def main() -> None:
    """One line a shape, format, batch and rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llama-1b", "llama-8b"])
    parser.add_argument("--weights", nargs="+", choices=SCHEMES, default=["bf16"])
    parser.add_argument("--rank", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--targets", nargs="+", default=list(shapes_of(SHAPES["llama-1b"])))
    parser.add_argument("--batching", choices=("fast", "exact"), default="fast", help="EngineConfig.decode_batching")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the prompt that is timed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    module = load_module()
    info = module.device_info()
    if not options.json:
        print(f"{info['name']}; context {CONTEXT}, decode_batching {options.batching}, {' '.join(options.targets)}")
    results = []
    for shape in options.shape:
        for weights in options.weights:
            for result in measure(shape, weights, options):
                results.append(result)
                if not options.json:
                    print_result(result)
    if options.json:
        print(json.dumps({"device": info["name"], "results": results}))


def measure(shape: str, weights: str, options: Any) -> list[dict[str, Any]]:
    """Every batch size without room for adapters, then with each rank."""
    model = SHAPES[shape]
    plain = open_executor(shape, weights, options, 0)
    times: dict[Any, Any] = {batch: time_decode(plain, batch, [], options.steps) for batch in options.batch}
    prefill = time_prefill(plain, 0, options.prefill)
    results = [
        {"shape": shape, "weights": weights, "batch": batch, "rank": None, "ms": times[batch], "prefill_ms": prefill,
         "mb": 0.0, "load_s": 0.0, "ratio": 1.0}
        for batch in options.batch
    ]  # fmt: skip
    plain.close()
    del plain
    gc.collect()
    executor = open_executor(shape, weights, options, 2)
    for rank in [0, *options.rank]:
        num_bytes, load_s = 0, 0.0
        if rank:
            adapter, num_bytes = random_adapter(model, rank, options.targets)
            started = time.perf_counter()
            executor.load_adapter("first", adapter)
            load_s = time.perf_counter() - started
            executor.load_adapter("second", adapter)
        prefill = time_prefill(executor, 1 if rank else 0, options.prefill)
        for batch in options.batch:
            adapters = [1 + i % 2 for i in range(batch)] if rank else []
            ms = time_decode(executor, batch, adapters, options.steps)
            results.append(
                {"shape": shape, "weights": weights, "batch": batch, "rank": rank, "ms": ms, "prefill_ms": prefill,
                 "mb": num_bytes / 1e6, "load_s": load_s, "ratio": ms / times[batch]}
            )  # fmt: skip
        for name in list(executor.adapters):
            executor.unload_adapter(name)
    executor.close()
    del executor
    gc.collect()
    return results


def open_executor(shape: str, weights: str, options: Any, max_loras: int) -> CudaExecutor:
    """An executor of random weights with room for `max_loras` adapters of the largest rank."""
    capacity = -(-(max(CONTEXT + 2 * options.steps, options.prefill) + 64) // 64) * 64
    config = EngineConfig(
        max_slots=max(options.batch), max_context=capacity, prefill_chunk=min(max(options.prefill, 16), 2048),
        decode_batching=options.batching, max_loras=max_loras, max_lora_rank=max(options.rank),
    )  # fmt: skip
    return CudaExecutor(RandomBundle(shape, weights), config)


def time_decode(executor: CudaExecutor, batch: int, adapters: list[int], steps: int) -> float:
    """Median device milliseconds of a step."""
    for slot in range(batch):
        adapter = adapters[slot] if adapters else 0
        executor.step([SequenceStep(slot, _tokens(executor, CONTEXT), 0, adapter=adapter)])
    decoder: Any = executor._decoder
    at = (list(range(batch)), [CONTEXT] * batch, [7] * batch)
    decoder.time_run(*at, 8, [], adapters)
    return statistics.median(decoder.time_run(*at, steps, [], adapters))


def time_prefill(executor: CudaExecutor, adapter: int, length: int) -> float:
    """Median milliseconds of a prompt of `length` tokens, by the host's clock."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        executor.step([SequenceStep(0, _tokens(executor, length), 0, adapter=adapter)])
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[1:])


def _tokens(executor: CudaExecutor, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, executor.info.vocab_size, length).astype(np.int32)


def print_result(r: dict[str, Any]) -> None:
    """One line."""
    rank = "no room" if r["rank"] is None else f"rank {r['rank']}"
    print(
        f"{r['shape']:9} {r['weights']:8} batch {r['batch']} {rank:8} {r['ms']:7.3f} ms/step ({r['ratio']:.3f} x)  "
        f"prefill {r['prefill_ms']:7.2f} ms  {r['mb']:6.1f} MB an adapter, loaded in {r['load_s']:.2f} s",
        flush=True,
    )


if __name__ == "__main__":
    run_script(main)
