"""Prefill of the CUDA executor on random weights: whole prompts, and what each group of kernels in a layer takes.

    python3 bench/bench_prefill.py --shape llama-8b --weights bf16 fp8 int4

Whole prompts are timed by the host's clock, logits of the last position included; "chunk of" is one chunk of a long
prompt whose other positions are cached. The groups are timed alone, repeated in one graph without a pause; weights are
more than the L2 cache holds, activations are the same each time, so small ones come from the cache as they do in a
prompt; int4 weights are copied to bf16 in them, which "fast" does for more than 128 tokens only. "sum" is all groups of
all layers: what is missing to the whole prompt is launches, embedding and head.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from kernel_timing import NATIVE, K, measure_us, print_machine, run_script, torch

from edgellm_ros.benchmark.costs import prefill_flops
from edgellm_ros.benchmark.random_bundle import SCHEMES, SHAPES, RandomBundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import UnsupportedError
from edgellm_ros.executors import SequenceStep
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.manifest import ModelSpec

WEIGHT_BYTES = 160 << 20  # of the copies that a product goes round, more than any L2 cache holds
EPS = 1e-5


def main() -> None:
    """Tables of whole prompts and of kernel groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llama-8b"])
    parser.add_argument("--weights", nargs="+", choices=SCHEMES, default=["bf16", "fp8", "int4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512, 2048, 8192])
    parser.add_argument("--chunk", type=int, default=2048, help="EngineConfig.prefill_chunk")
    parser.add_argument("--batching", choices=("fast", "exact"), nargs="+", default=["exact", "fast"])
    parser.add_argument("--groups", nargs="*", type=int, default=[512, 2048], help="tokens to time the groups at")
    options = parser.parse_args()
    print_machine()
    print("shape      weights   batching  tokens        ms  TFLOP/s")
    for shape in options.shape:
        for weights in options.weights:
            for batching in options.batching:
                time_prompts(shape, weights, batching, options.tokens, options.chunk)
    for shape in options.shape:
        for tokens in options.groups:
            for weights in options.weights:
                time_groups(SHAPES[shape], weights, tokens)


def time_prompts(shape: str, weights: str, batching: str, lengths: list[int], chunk: int) -> None:
    """Whole prompts, then one chunk of 512 at the end of the longest."""
    bundle = RandomBundle(shape, weights)
    longest = max(lengths)
    capacity = -(-(longest + 64) // 64) * 64
    config = EngineConfig(max_slots=2, max_context=capacity, prefill_chunk=chunk, decode_batching=batching)
    started = time.monotonic()
    executor = CudaExecutor(bundle, config)
    load_s = time.monotonic() - started
    model = bundle.manifest.model
    ids = np.random.default_rng(1).integers(0, model.vocab_size, longest).astype(np.int32)

    def report(name: str, ms: float, flops: float) -> None:
        print(f"{shape:10s} {weights:9s} {batching:9s} {name:>6s}  {ms:8.2f} {flops / ms * 1e-9:8.1f}", flush=True)

    for length in lengths:
        report(str(length), time_step_ms(executor, ids[:length], 0, chunk), prefill_flops(model, length))
    if longest > 1024:
        ms = time_step_ms(executor, ids[-512:], longest - 512, chunk)
        report(f"chunk of {longest}", ms, prefill_flops(model, longest) - prefill_flops(model, longest - 512))
    print(f"{shape:10s} {weights:9s} {batching:9s} loaded in {load_s:.1f} s")
    executor.close()
    del executor
    gc.collect()


def time_step_ms(executor: CudaExecutor, ids: Any, position: int, chunk: int) -> float:
    """Median of five prompts, cut as the engine cuts them: only the last chunk computes logits."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        for first in range(0, len(ids), chunk):
            part = ids[first : first + chunk]
            executor.step([SequenceStep(0, part, position + first, int(first + chunk >= len(ids)))])
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[2:])


def bf16(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(torch.bfloat16)


def byte_values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(torch.float8_e4m3fn).view(torch.uint8)


def time_groups(model: ModelSpec, weights: str, tokens: int) -> None:
    """One line a group: us a layer, ms in all layers, and TFLOP/s or GB/s."""
    hidden, width = model.hidden_size, model.intermediate_size
    q_width = model.num_heads * model.head_dim
    qkv_width = q_width + 2 * model.num_kv_heads * model.head_dim
    fp8 = weights == "fp8"
    print(f"\n{model.name}, {weights}, {tokens} tokens: us a layer, ms in {model.num_layers} layers")
    total = 0.0

    def report(name: str, us: float, flops: float = 0.0, num_bytes: float = 0.0) -> None:
        nonlocal total
        total += us * model.num_layers / 1e3
        rate = f"{flops / us * 1e-6:8.1f} TFLOP/s" if flops else f"{num_bytes / us * 1e-3:8.1f} GB/s"
        print(f"  {name:14s} {us:9.1f} {us * model.num_layers / 1e3:8.2f} {rate}", flush=True)

    shapes = {
        "qkv": (qkv_width, hidden),
        "o": (hidden, q_width),
        "gate_up": (2 * width, hidden),
        "down": (hidden, width),
    }
    for name, (rows, cols) in shapes.items():
        report(name, time_product_us(rows, cols, tokens, fp8), flops=2.0 * rows * cols * tokens)
    if not fp8 and weights != "bf16":
        for name, (rows, cols) in shapes.items():
            us, read = time_dequantise_us(weights, rows, cols, name == "gate_up")
            report(f"{name} to bf16", us, num_bytes=read + rows * cols * 2.0)

    kv = bf16(1, 2, model.num_kv_heads, tokens, model.head_dim).to(torch.float16)
    cos, sin = (torch.rand((tokens, model.head_dim // 2), device="cuda") for _ in range(2))
    slots, positions = (
        torch.zeros(tokens, device="cuda", dtype=torch.int32),
        torch.arange(tokens, device="cuda", dtype=torch.int32),
    )
    qkv, q = bf16(tokens, qkv_width), bf16(tokens, q_width)
    rows_scale = torch.ones(tokens, device="cuda")
    ones = {n: torch.ones(n, device="cuda") for n in {qkv_width, hidden, 2 * width}}

    def scales(n: int) -> dict[str, Any]:
        return {"row_scales": rows_scale, "column_scales": ones[n]} if fp8 else {}

    us = measure_us(
        [
            lambda s: K.rope_kv_write(
                qkv, kv, slots, positions, cos, sin, q, model.num_heads, stream=s, **scales(qkv_width)
            )
        ]
        * 4
    )
    report("rope", us, num_bytes=4.0 * tokens * qkv_width)
    starts = torch.tensor([0, tokens], device="cuda", dtype=torch.int32)
    attended = bf16(tokens, q_width)
    zero = torch.zeros(1, device="cuda", dtype=torch.int32)
    us = measure_us(
        [lambda s: K.prefill_attention(q, kv, starts, zero, zero, attended, tokens, model.head_dim**-0.5, stream=s)] * 4
    )
    report("attention", us, flops=2.0 * tokens * (tokens + 1) * q_width)

    residual, gain = torch.randn((tokens, hidden), device="cuda"), bf16(hidden)
    delta, normed = bf16(tokens, hidden), bf16(tokens, hidden)
    small, small_scales = byte_values(tokens, max(hidden, q_width, width)), torch.ones(tokens, device="cuda")
    if fp8:
        narrow = small.view(-1)[: tokens * q_width].view(tokens, q_width)
        us = measure_us([lambda s: K.quantize_fp8(attended, narrow, small_scales, stream=s)] * 4)
        report("to fp8", us, num_bytes=3.0 * tokens * q_width)
    to: dict[str, Any] = {"normed": normed}
    if fp8:
        to = {"normed_fp8": small.view(-1)[: tokens * hidden].view(tokens, hidden), "normed_scales": small_scales}
    us = measure_us(
        [lambda s: K.residual_norm(delta, residual, gain=gain, eps=EPS, stream=s, **scales(hidden), **to)] * 4
    )
    report("2 norms", 2 * us, num_bytes=2.0 * tokens * hidden * (11 if fp8 else 12))
    gate_up, activated = bf16(tokens, 2 * width), bf16(tokens, width)
    out = small.view(-1)[: tokens * width].view(tokens, width) if fp8 else activated
    more = {"out_scales": small_scales} if fp8 else {}
    us = measure_us([lambda s: K.swiglu(gate_up, out, stream=s, **scales(2 * width), **more)] * 4)
    report("swiglu", us, num_bytes=tokens * width * (5.0 if fp8 else 6.0))
    print(f"  {'sum':14s} {'':9s} {total:8.2f}")


def time_product_us(rows: int, cols: int, tokens: int, fp8: bool) -> float:
    """One product with the algorithm that the executor would take in exact mode."""
    make: Callable[..., torch.Tensor] = byte_values if fp8 else bf16
    memory = torch.empty(K.MatrixProducts.DEVICE_BYTES, dtype=torch.uint8, device="cuda")
    products = K.MatrixProducts(memory, tokens, True)
    weight_bytes = rows * cols * (1 if fp8 else 2)
    copies = [make(rows, cols) for _ in range(max(2, -(-WEIGHT_BYTES // weight_bytes)))]
    x, y = make(tokens, cols), bf16(tokens, rows)
    if not products.prepare(copies[0], x, y, stream=torch.cuda.current_stream().cuda_stream):
        raise UnsupportedError(f"cuBLASLt has no product for {rows} x {cols}; leave this shape out")
    torch.cuda.synchronize()
    return measure_us([lambda s, w=w: products.run(x, w, y, stream=s) for w in copies])  # type: ignore[misc]


def time_dequantise_us(weights: str, rows: int, cols: int, gate_up: bool, group: int = 0) -> tuple[float, float]:
    """A whole weight to bf16, and the bytes it reads; in groups of `group`, or the scheme's own."""
    int4 = weights.startswith("int4")
    group = group or SCHEMES[weights].group_size
    if int4:
        data = torch.randint(0, 256, (K.int4_packed_data_bytes(rows, cols),), dtype=torch.uint8, device="cuda")
        scales = torch.zeros(K.int4_packed_scales_bytes(rows, cols, group), dtype=torch.uint8, device="cuda")
    else:
        data = torch.randint(-127, 127, (rows, cols), dtype=torch.int8, device="cuda")
        scales = torch.ones((rows, cols // group), dtype=torch.float16, device="cuda")
    view = (NATIVE.WeightFormat.int4 if int4 else NATIVE.WeightFormat.int8, data, scales, rows, cols, group)
    out = bf16(rows, cols)
    us = measure_us([lambda s: K.dequantize(view, gate_up and int4, 0, out, stream=s)] * 4)
    return us, float(data.numel() + scales.numel() * scales.element_size())


if __name__ == "__main__":
    run_script(main)
