"""The kernels between products and attention: embedding, norms, RoPE, SwiGLU, LoRA, changes of format, moved rows.

    python3 bench/bench_small_kernels.py [--shape 8b] [--tokens 1 512 2048]

Bytes are those that a call must read and write; the share is of the read bandwidth measured in the same run. At few
tokens a call is shorter than a launch, and what counts is its time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from bench_gemv import random_weight
from kernel_timing import NATIVE, K, measure_us, print_machine, run_script, torch

SHAPES = {"1b": (2048, 8192, 128256), "4b": (2560, 9728, 151936), "8b": (4096, 14336, 128256)}  # hidden, MLP, vocab
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # of RoPE and of moved keys and values
LAYERS, RANK, GROUP = 32, 16, 64
CAPACITY = 4096  # of an engine's mask
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

    def ints(values: Iterable[int]) -> Any:
        return torch.tensor(list(values), device="cuda", dtype=torch.int32)

    lora_tokens, logit_rows, rows = min(n, 16), min(n, 16), min(n, 8)  # of a decode step
    table = (NATIVE.WeightFormat.bf16, floats(vocab, hidden), None, vocab, hidden, 0)
    int8_table, _ = random_weight("int8", vocab, hidden, GROUP)

    def embedding(stored: tuple[Any, ...]) -> Callable[[int], Any]:
        ids = torch.randint(0, vocab, (n,), device="cuda", dtype=torch.int32)
        out = empty(n, hidden, dtype=f32), empty(n, hidden)
        return lambda stream: K.embedding(stored, ids, *out, stream=stream)

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

    def rope(head_dim: int = HEAD_DIM, cached_as: Any = bf16) -> Callable[[int], Any]:
        qkv, out = floats(n, (HEADS + 2 * KV_HEADS) * head_dim), empty(n, HEADS * head_dim)
        cache = empty(1, 2, KV_HEADS, n, head_dim, dtype=cached_as)
        tables = [floats(n, head_dim // 2, dtype=f32) for _ in range(2)]
        slots, positions = torch.zeros(n, device="cuda", dtype=torch.int32), ints(range(n))
        return lambda stream: K.rope_kv_write(qkv, cache, slots, positions, *tables, out, HEADS, stream=stream)

    def lora(rows: int) -> tuple[Any, Any]:
        """The table's entry of one adapter of one target, and what its pointers lead to."""
        a, b = floats(RANK, hidden), floats(rows * RANK)
        return K.lora_linear(a, b, [rows], [RANK]), (a, b)

    def lora_down() -> Callable[[int], Any]:
        entry, kept = lora(hidden)
        table = torch.frombuffer(bytearray(entry), dtype=torch.uint8).view(1, -1).cuda()
        view = table, ints([1] * lora_tokens), empty(lora_tokens, 64, dtype=f32)
        x = floats(lora_tokens, hidden)
        return lambda stream, kept=kept: K.lora_down(view, x, stream=stream)

    def lora_prefill() -> Callable[[int], Any]:
        entry, kept = lora(hidden)
        x, h, y = floats(n, hidden), empty(n, RANK), floats(n, hidden)
        return lambda stream, kept=kept: K.lora_prefill(entry, [hidden], x, h, y, stream=stream)

    def fp8_rows() -> Callable[[int], Any]:
        x, out, scales = floats(n, hidden), empty(n, hidden, dtype=torch.uint8), empty(n, dtype=f32)
        return lambda stream: K.quantize_fp8(x, out, scales, stream=stream)

    def to_bf16() -> Callable[[int], Any]:
        x, out = floats(n * hidden, dtype=f32), empty(n * hidden)
        return lambda stream: K.convert_to_bf16(x, out, stream=stream)

    def widen() -> Callable[[int], Any]:
        y, out = floats(n, hidden), empty(n, hidden, dtype=f32)
        return lambda stream: K.widen(y, out, stream=stream)

    def soft_cap() -> Callable[[int], Any]:
        x = floats(logit_rows, vocab, dtype=f32)
        return lambda stream: K.soft_cap(x, 30.0, stream=stream)

    def accepted_path() -> Callable[[int], Any]:
        """Four of 16 nodes, moved in every layer."""
        cache = empty(LAYERS, 1, 2, KV_HEADS, 64, HEAD_DIM)
        where = ints([0]), ints([32]), ints([0, 3, 7, 12]).view(1, -1), ints([4])
        return lambda stream: K.kv_compact(cache, *where, stream=stream)

    def repack_int4() -> Callable[[int], Any]:
        nibbles = torch.randint(0, 256, (hidden, hidden // 2), device="cuda", dtype=torch.uint8)
        scales = floats(hidden, hidden // 64, dtype=torch.float16)
        data = empty(K.int4_packed_data_bytes(hidden, hidden), dtype=torch.uint8)
        packed = empty(K.int4_packed_scales_bytes(hidden, hidden, 64), dtype=torch.uint8)
        return lambda stream: K.repack_int4(nibbles, scales, 64, False, data, packed, stream=stream)

    def count_tokens() -> Callable[[int], Any]:
        ids, counts = ints(range(n)), torch.zeros(vocab, device="cuda", dtype=torch.int32)
        return lambda stream: K.count_tokens(ids, n // 2, counts, stream=stream)

    def engine_out(rows: int, sequences: int) -> tuple[Any, ...]:
        longs = [empty(count, dtype=torch.int64) for count in (rows, sequences, rows, rows)]
        return empty(rows, hidden, dtype=torch.float16), *longs

    def engine_rows() -> Callable[[int], Any]:
        x, at, out = floats(rows, hidden, dtype=f32), ints(range(rows)), engine_out(rows, rows)
        members = (1 << rows) - 1
        return lambda stream: K.engine_rows(x, at, at, members, 0, rows, 0, out, stream=stream)

    def engine_chunk() -> Callable[[int], Any]:
        x, out = floats(n, hidden, dtype=f32), engine_out(n, 1)
        return lambda stream: K.engine_chunk(x, 0, 1, out, stream=stream)

    def engine_mask() -> Callable[[int], Any]:
        at, mask = ints(range(n)).long(), empty(n, CAPACITY, dtype=torch.float16)
        return lambda stream: K.engine_mask(at, mask, stream=stream)

    def dequantize(form: str) -> Callable[[int], Any]:
        (weight, _), out = random_weight(form, hidden, hidden, GROUP), empty(hidden, hidden)
        return lambda stream: K.dequantize(weight, False, 0, out, stream=stream)

    def map_input() -> Callable[[int], Any]:
        x, out, factor = floats(n, hidden), empty(n, hidden), floats(hidden, dtype=f32)
        order = torch.randperm(hidden, device="cuda").to(torch.int32)
        return lambda stream: K.map_input(x, out, order, factor, stream=stream)

    row, qkv = n * hidden, n * (HEADS + 2 * KV_HEADS) * HEAD_DIM
    square, cached = hidden * hidden, n * 2 * KV_HEADS * HEAD_DIM
    return {
        "embedding": (row * (2 + 4 + 2), partial(embedding, table)),
        "embedding, int8": (row * (1 + 4 + 2), partial(embedding, int8_table)),
        "image embeddings": (row * (2 + 4 + 2), images),
        "RMSNorm": (row * (4 + 2), rms_norm),
        "residual + RMSNorm": (row * (2 + 4 + 4 + 2), residual_norm),
        "RoPE, KV write": (qkv * 4, rope),
        "RoPE, fp16 KV": (qkv * 4, partial(rope, cached_as=torch.float16)),
        "RoPE, FP8 KV": (qkv * 4 - cached, partial(rope, cached_as=torch.uint8)),
        "RoPE, heads of 80": (qkv // HEAD_DIM * 80 * 4, partial(rope, 80)),
        "SwiGLU": (n * width * 6, swiglu),
        "LoRA A of a step": (RANK * hidden * 2 + lora_tokens * hidden * 2, lora_down),
        "LoRA of a prompt": (2 * RANK * hidden * 2 + row * 6, lora_prefill),
        "order and factor": (row * 4, map_input),
        "accepted path": (3 * LAYERS * 2 * KV_HEADS * HEAD_DIM * 4, accepted_path),
        "capped logits": (logit_rows * vocab * 8, soft_cap),
        "counts of tokens": (n * 12, count_tokens),
        "fp32 to bf16": (row * 6, to_bf16),
        "bf16 to fp32": (row * 6, widen),
        "rows to FP8": (row * 3, fp8_rows),
        "int8 to bf16": (square * 3, partial(dequantize, "int8")),
        "int8, offset to bf16": (square * 3 + square // GROUP * 4, partial(dequantize, "int8_offset")),
        "FP8 to bf16": (square * 3, partial(dequantize, "fp8")),
        "int4 into order": (square, repack_int4),
        "engine's rows": (rows * hidden * 6, engine_rows),
        "engine's chunk": (row * 6, engine_chunk),
        "engine's mask": (n * CAPACITY * 2, engine_mask),
    }


if __name__ == "__main__":
    run_script(main)
