"""How fast this machine reads memory: the yardstick that decode figures are compared with, measured in the same run."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from edgellm_ros import native
from edgellm_ros.executors.base import ON_GPU
from edgellm_ros.memory import available_memory, free_device_memory, physical_cores

_CPU_BYTES = 512 << 20  # many times any last-level cache that a robot has
_GPU_BYTES = 2 << 30
_PASSES = 5


@dataclass(frozen=True)
class ReadBandwidth:
    """GB/s of a program that only reads, and how it was measured, for people."""

    gb_per_s: float
    method: str


def measure_read_bandwidth(executor: str, num_threads: int = 0) -> ReadBandwidth:
    """Of the memory that `executor`, a name, computes from; `num_threads` 0 is one a physical core."""
    if executor in ON_GPU:
        return _read_gpu()
    return _read_cpu(num_threads or physical_cores())


def _read_gpu() -> ReadBandwidth:
    module = native.load()
    num_bytes = min(_GPU_BYTES, free_device_memory(module.device_info()) // 4) >> 20 << 20
    return ReadBandwidth(float(module.measure_read_bandwidth(num_bytes)), f"kernel that reads {num_bytes >> 20} MiB")


def _read_cpu(num_threads: int) -> ReadBandwidth:
    """The best of a few passes: fp64 sums were the fastest of NumPy's reductions (31 GB/s where integers gave 24)."""
    num_bytes = min(_CPU_BYTES, available_memory() // 4)
    parts = np.array_split(np.full(num_bytes // 8, 1.0), num_threads)  # written, or all pages would be the zero page
    best_s = float("inf")
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(_PASSES):
            started = time.perf_counter()
            for _ in pool.map(np.add.reduce, parts):  # NumPy lets the interpreter go while it adds
                pass
            best_s = min(best_s, time.perf_counter() - started)
    threads = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
    method = f"NumPy sums of {num_bytes >> 20} MiB in {threads}, best of {_PASSES}"
    return ReadBandwidth(sum(part.nbytes for part in parts) / best_s / 1e9, method)
