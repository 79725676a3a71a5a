"""The TensorRT plugins, called through TensorRT's interface: microseconds of a step, beside those of the kernel alone.

    python3 bench/bench_plugins.py

A line is one plugin, many of it in a CUDA graph, each over other weights or another cache: more than L2 holds.
"kernel" is the native decoder's kernel for the same, with programmatic dependent launch. What the plugin takes beside
that is number formats, lists and launches. No TensorRT is involved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from bench_attention_decode import time_us as time_attention_kernel
from bench_gemv import random_weight
from kernel_timing import K, measure_us, print_machine, run_script, torch
from plugin_case import BF16, DRIVER, HALF, Plugin, attention_tensors, gemm_tensors

from edgellm_ros.errors import UnsupportedError
from edgellm_ros.trt_plugins import find_library

TYPES = {"fp16": (HALF, torch.float16), "bf16": (BF16, torch.bfloat16)}
PRODUCTS = {"1b gate_up": (16384, 2048), "1b down": (2048, 8192), "8b qkv": (6144, 4096), "8b gate_up": (28672, 4096)}
ATTENTIONS = {"1b": (32, 8, 64), "8b": (32, 8, 128)}
GROUP = 64
FEWEST_BYTES = 160 << 20  # of all weights or caches together


def main() -> None:
    """Products by shape, bits, tokens and dtype, then attention by shape, context and dtype."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    read = print_machine()
    if not (find_library().parent / DRIVER).is_file():
        raise UnsupportedError(f"{DRIVER} is not beside {find_library()}; tools/build_native.py builds both")
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    print("plugin     shape      tokens dtype       us   kernel     GB/s  share")

    def line(plugin: str, shape: str, tokens: int, dtype: str, us: float, kernel: float, num_bytes: int) -> None:
        rate = num_bytes / us * 1e-3
        print(f"{plugin:10s} {shape:10s} {tokens:6d} {dtype:5s} {us:8.2f} {kernel:8.2f} {rate:8.0f} {rate / read:6.1%}",
              flush=True)  # fmt: skip

    for name, (rows, cols) in PRODUCTS.items():
        for bits in (4, 8):
            weights, num_bytes = random_weights(bits, rows, cols)
            for tokens in (1, 16):
                kernel = time_product_kernel(weights, rows, cols, tokens)
                for dtype in TYPES:
                    us = time_product(bits, weights, rows, cols, tokens, dtype)
                    line(f"int{bits} gemm", name, tokens, dtype, us, kernel, num_bytes)
    for name, shape in ATTENTIONS.items():
        for context in (512, 4096):
            most = K.decode_attention_most_splits(shape[1], num_sms)
            kernel = time_attention_kernel(*shape, context, 1, torch.bfloat16, most, 0)
            for dtype in TYPES:
                us = time_attention(*shape, context, dtype)
                line("attention", f"{name} {context}", 1, dtype, us, kernel, 4 * shape[1] * context * shape[2])


def random_weights(bits: int, rows: int, cols: int) -> tuple[list[Any], int]:
    """Weights as the bindings take them, enough of them; and the bytes of one."""
    first, num_bytes = random_weight(f"int{bits}", rows, cols, GROUP)
    count = max(2, -(-FEWEST_BYTES // num_bytes))
    return [first, *(random_weight(f"int{bits}", rows, cols, GROUP)[0] for _ in range(count - 1))], num_bytes


def time_product(bits: int, weights: list[Any], rows: int, cols: int, tokens: int, dtype: str) -> float:
    """Microseconds of a product by the plugin."""
    kind, torch_dtype = TYPES[dtype]
    settings = {"rows": rows, "cols": cols, "group": GROUP, "bias": 0, "float_output": 0}
    plugin = Plugin(f"EdgeLLMInt{bits}Gemm", settings)
    ins, outs = gemm_tensors(bits, settings, (tokens,), kind)
    x = torch.randn((tokens, cols), device="cuda").to(torch_dtype)
    out = torch.empty((tokens, rows), device="cuda", dtype=torch_dtype)
    workspace = torch.empty(max(1, plugin.workspace(ins, outs)), dtype=torch.uint8, device="cuda")

    def call(index: int) -> Callable[[int], None]:
        _, data, scales, *_ = weights[index % len(weights)]
        addresses = [t.data_ptr() for t in (x, data, scales, out)]
        return lambda stream: plugin.enqueue(ins, outs, addresses, workspace.data_ptr(), stream)

    return measure_us([call(i) for i in range(max(32, len(weights)))])


def time_product_kernel(weights: list[Any], rows: int, cols: int, tokens: int) -> float:
    """Microseconds of the native decoder's product: bf16 in, fp32 out."""
    x = torch.randn((tokens, cols), device="cuda").to(torch.bfloat16)
    out = torch.empty((tokens, rows), device="cuda")

    def call(index: int) -> Callable[[int], None]:
        view = weights[index % len(weights)]
        return lambda stream: K.gemv(view, x, out, stream=stream, pdl=index > 0)

    return measure_us([call(i) for i in range(max(32, len(weights)))])


def time_attention(heads: int, kv_heads: int, head_dim: int, context: int, dtype: str) -> float:
    """Microseconds of a decode step's attention at the end of `context`."""
    kind, torch_dtype = TYPES[dtype]
    settings = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "scale": head_dim**-0.5}
    plugin = Plugin("EdgeLLMAttention", settings)
    ins, outs = attention_tensors(settings, 1, 1, context, type=kind)
    shape = (1, 2, kv_heads, context, head_dim)
    count = max(2, -(-FEWEST_BYTES // (4 * kv_heads * context * head_dim)))
    caches = [torch.randn(shape, device="cuda").to(torch_dtype) for _ in range(count)]
    qkv = torch.randn((1, 1, (heads + 2 * kv_heads) * head_dim), device="cuda").to(torch_dtype)
    ids = torch.full((1, 1), context - 1, device="cuda", dtype=torch.int64)
    cos, sin = (torch.ones((context, head_dim // 2), device="cuda") for _ in range(2))
    out = torch.empty((1, 1, heads * head_dim), device="cuda", dtype=torch_dtype)
    workspace = torch.empty(plugin.workspace(ins, outs), dtype=torch.uint8, device="cuda")

    def call(index: int) -> Callable[[int], None]:
        cache = caches[index % count]
        addresses = [t.data_ptr() for t in (qkv, cache, ids, ids, cos, sin, out, cache)]
        return lambda stream: plugin.enqueue(ins, outs, addresses, workspace.data_ptr(), stream)

    return measure_us([call(i) for i in range(max(32, count))])


if __name__ == "__main__":
    run_script(main)
