"""Tree attention: microseconds and GB/s of keys and values by context and tokens, beside decode attention's."""

from __future__ import annotations

import argparse
from typing import Any

from bench_attention_decode import NUM_CALLS, SHAPES
from bench_attention_decode import time_us as decode_us
from kernel_timing import K, measure_us, print_machine, run_script, torch


def main() -> None:
    """One line a shape and context: one decoded token, then trees of 4, 8, 16, 32 and 64."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    read = print_machine()
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    print("shape    context |  decode     us   GB/s | tree tokens: us (GB/s, share of the read bandwidth)")
    for shape, (heads, kv_heads, head_dim) in SHAPES.items():
        for context in (512, 4096, 16384):
            most_splits = K.decode_attention_most_splits(kv_heads, num_sms)
            one = decode_us(heads, kv_heads, head_dim, context, 1, torch.float16, most_splits, 0)
            num_bytes = context * kv_heads * head_dim * 4
            columns = []
            for tokens in (4, 8, 16, 32, 64):
                us = time_us(heads, kv_heads, head_dim, context, tokens)
                rate = num_bytes / us * 1e-3
                columns.append(f"{tokens}: {us:.2f} ({rate:.0f}, {rate / read:.0%})")
            print(
                f"{shape:8s} {context:7d} | {one:14.2f} {num_bytes / one * 1e-3:6.0f} | {'  '.join(columns)}",
                flush=True,
            )


def time_us(heads: int, kv_heads: int, head_dim: int, context: int, tokens: int, splits: int = 0) -> float:
    """Microseconds of one call with a chain of `tokens` new tokens that ends at `context`; batch 1, fp16 cache."""
    caches = [
        torch.randn((1, 2, kv_heads, context, head_dim), device="cuda", dtype=torch.float16) for _ in range(NUM_CALLS)
    ]
    qkv = torch.randn((tokens, (heads + 2 * kv_heads) * head_dim), device="cuda")
    starts, slots, positions = (
        torch.tensor(v, device="cuda", dtype=torch.int32) for v in ([0, tokens], [0], [context - tokens])
    )
    depths = torch.arange(tokens, device="cuda", dtype=torch.int32)
    words = [(1 << (i + 1)) - 1 for i in range(tokens)]
    masks = torch.tensor([w - (1 << 64) if w >> 63 else w for w in words], device="cuda", dtype=torch.int64)
    cos, sin = (torch.ones((context, head_dim // 2), device="cuda") for _ in range(2))
    out = torch.empty((tokens, heads * head_dim), device="cuda", dtype=torch.bfloat16)
    workspace = torch.zeros(K.tree_attention_workspace_bytes(tokens, heads, head_dim), device="cuda", dtype=torch.uint8)

    def launch(index: int) -> Any:
        return lambda stream: K.tree_attention(
            qkv, caches[index], starts, slots, positions, depths, masks, cos, sin, out, tokens, heads,
            head_dim**-0.5, splits=splits, workspace=workspace, stream=stream, pdl=index > 0,
        )  # fmt: skip

    return measure_us([launch(i) for i in range(NUM_CALLS)])


if __name__ == "__main__":
    run_script(main)
