"""Timing of single kernels: launches captured in one CUDA graph, weights far larger than L2, the GPU named."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "test" / "native")]

from gpu_or_exit import load_module, one_line, run_script  # noqa: E402

from edgellm_ros.errors import UnsupportedError  # noqa: E402

with one_line():  # a robot has neither torch nor what tests are run with
    import torch
    from kernel_case import NATIVE, K

__all__ = ["NATIVE", "K", "measure_us", "print_machine", "run_script", "torch"]


def print_machine() -> float:
    """Name the GPU; returns the read bandwidth in GB/s that a kernel which only reads reaches.

    Raises UnsupportedError without a GPU that the module and torch can use.
    """
    load_module()
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"torch {torch.__version__} cannot use the GPU; install one for the driver's CUDA version"
        )
    read = float(NATIVE.measure_read_bandwidth(1 << 30))
    print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, read-only kernel {read:.0f} GB/s")
    return read


def measure_us(launches: list[Callable[[int], Any]], repeats: int = 7) -> float:
    """Median microseconds a launch, all of `launches` (each takes a stream) back to back in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the inputs, slots and positions among them
    with torch.cuda.stream(stream):
        for launch in launches[:2]:
            launch(stream.cuda_stream)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for launch in launches:
            launch(stream.cuda_stream)
        graph.capture_end()
        times = []
        for _ in range(repeats + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times[2:])
