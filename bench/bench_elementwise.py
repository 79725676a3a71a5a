"""The kernels that only move numbers: embedding, norms, SwiGLU, dequantisation. RoPE with the KV write is in
bench_prefill.py.

    python3 bench/bench_elementwise.py [--shape 8b] [--tokens 1 512 2048]

Bytes are those that a call must read and write; the share is of the read bandwidth measured in the same run. At few
tokens a call is shorter than a launch, and what counts is its time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from kernel_timing import NATIVE, K, measure_us, print_machine

SHAPES = {"1b": (2048, 8192, 128256), "4b": (2560, 9728, 151936), "8b": (4096, 14336, 128256)}  # hidden, MLP, vocab
NUM_CALLS = 16
DISTINCT_BYTES = 1 << 28  # of buffers in turn: five times the L2


def main() -> None:
    """One line a shape, number of tokens and kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["8b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 512, 2048])
    options = parser.parse_args()
    read = print_machine()
    print("shape tokens kernel                  us     GB/s  share")
    for shape in options.shape:
        for tokens in options.tokens:
            for name, (num_bytes, make) in kernels(shape, tokens).items():
                count = max(2, min(NUM_CALLS, -(-DISTINCT_BYTES // num_bytes)))
                calls = [make() for _ in range(count)]
                us = measure_us([calls[i % count] for i in range(max(NUM_CALLS, count))])
                rate = num_bytes / us * 1e-3
                print(f"{shape:5s} {tokens:6d} {name:20s} {us:8.2f} {rate:8.0f} {rate / read:6.1%}", flush=True)


def kernels(shape: str, tokens: int) -> dict[str, tuple[int, Callable[[], Callable[[int], Any]]]]:
    """The bytes of each kernel's call, and what makes one over buffers of its own."""
    hidden, width, vocab = SHAPES[shape]
    n = tokens
    bf16, f32 = torch.bfloat16, torch.float32

    def floats(*size: int, dtype: Any = bf16) -> Any:
        return torch.randn(size, device="cuda").to(dtype)

    def empty(*size: int, dtype: Any = bf16) -> Any:
        return torch.empty(size, device="cuda", dtype=dtype)

    table = (NATIVE.WeightFormat.bf16, floats(vocab, hidden), None, vocab, hidden, 0)

    def embedding() -> Callable[[int], Any]:
        ids = torch.randint(0, vocab, (n,), device="cuda", dtype=torch.int32)
        out = empty(n, hidden, dtype=f32), empty(n, hidden)
        return lambda stream: K.embedding(table, ids, *out, stream=stream)

    def images() -> Callable[[int], Any]:
        rows, out = floats(n, hidden), (empty(n, hidden, dtype=f32), empty(n, hidden))
        return lambda stream: K.embeddings_from_bf16(rows, *out, stream=stream)

    def rms_norm() -> Callable[[int], Any]:
        x, gain, out = floats(n, hidden, dtype=f32), floats(hidden), empty(n, hidden)
        return lambda stream: K.rms_norm(x, gain, 1e-5, out, stream=stream)

    def residual_norm() -> Callable[[int], Any]:
        delta, residual, gain = floats(n, hidden), floats(n, hidden, dtype=f32), floats(hidden)
        out = empty(n, hidden)
        return lambda stream: K.residual_norm(delta, residual, None, None, gain, 1e-5, out, stream=stream)

    def swiglu() -> Callable[[int], Any]:
        gate_up, out = floats(n, 2 * width), empty(n, width)
        return lambda stream: K.swiglu(gate_up, out, stream=stream)

    def dequantize() -> Callable[[int], Any]:
        data = torch.randint(-127, 128, (hidden, hidden), device="cuda", dtype=torch.int8)
        scales = torch.full((hidden, hidden // 64), 0.01, device="cuda", dtype=torch.float16)
        weight, out = (NATIVE.WeightFormat.int8, data, scales, hidden, hidden, 64), empty(hidden, hidden)
        return lambda stream: K.dequantize(weight, False, 0, out, stream=stream)

    def map_input() -> Callable[[int], Any]:
        x, out, factor = floats(n, hidden), empty(n, hidden), floats(hidden, dtype=f32)
        order = torch.randperm(hidden, device="cuda").to(torch.int32)
        return lambda stream: K.map_input(x, out, order, factor, stream=stream)

    row = n * hidden
    return {
        "embedding": (row * (2 + 4 + 2), embedding),
        "image embeddings": (row * (2 + 4 + 2), images),
        "RMSNorm": (row * (4 + 2), rms_norm),
        "residual + RMSNorm": (row * (2 + 4 + 4 + 2), residual_norm),
        "SwiGLU": (n * width * 6, swiglu),
        "order and factor": (row * 4, map_input),
        "int8 to bf16": (hidden * hidden * 3, dequantize),
    }


if __name__ == "__main__":
    main()
