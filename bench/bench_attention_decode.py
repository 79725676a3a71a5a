"""Decode attention: microseconds and GB/s of keys and values, by context, batch and number of splits."""

from __future__ import annotations

from typing import Any

import torch
from kernel_timing import K, measure_us, print_machine

HEADS = {"1b": (32, 8, 64), "4b": (32, 8, 128), "smollm2": (9, 3, 64)}  # 8B's are 4B's
NUM_LAYERS = 8  # caches in turn, so that L2 does not hold them


def main() -> None:
    """One line a shape, context and batch; the splits that are chosen by length, and all others tried."""
    read = print_machine()
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    print("shape    context batch  splits       us     GB/s  share | us by splits")
    for shape, (heads, kv_heads, head_dim) in HEADS.items():
        for context in (512, 4096, 16384):
            for batch in (1, 8):
                chosen = K.decode_attention_splits(batch, kv_heads, context, num_sms)
                times = {
                    s: time_us(heads, kv_heads, head_dim, context, batch, s) for s in sorted({chosen, 4, 8, 16, 32, 64})
                }
                num_bytes = batch * context * kv_heads * head_dim * 4
                rate = num_bytes / times[chosen] * 1e-3
                rest = " ".join(f"{s}:{t:.2f}" for s, t in times.items())
                print(
                    f"{shape:8s} {context:7d} {batch:5d} {chosen:7d} {times[chosen]:8.2f} {rate:8.0f} "
                    f"{rate / read:6.1%} | {rest}",
                    flush=True,
                )


def time_us(heads: int, kv_heads: int, head_dim: int, context: int, batch: int, splits: int) -> float:
    """Microseconds of one call."""

    def cache() -> Any:
        return torch.randn((batch, 2, kv_heads, context, head_dim), device="cuda", dtype=torch.bfloat16)

    caches = [cache() for _ in range(NUM_LAYERS)]
    qkv = torch.randn((batch, (heads + 2 * kv_heads) * head_dim), device="cuda")
    slots = torch.arange(batch, device="cuda", dtype=torch.int32)
    positions = torch.full((batch,), context - 1, device="cuda", dtype=torch.int32)
    cos, sin = (torch.ones((context, head_dim // 2), device="cuda") for _ in range(2))
    out = torch.empty((batch, heads * head_dim), device="cuda", dtype=torch.bfloat16)
    workspace = torch.zeros(
        K.decode_attention_workspace_bytes(batch, heads, head_dim), device="cuda", dtype=torch.uint8
    )

    def launch(index: int) -> Any:
        return lambda stream: K.decode_attention(
            qkv, caches[index % NUM_LAYERS], slots, positions, cos, sin, out, heads, head_dim**-0.5,
            splits=splits, workspace=workspace, stream=stream, pdl=index > 0,
        )  # fmt: skip

    return measure_us([launch(i) for i in range(4 * NUM_LAYERS)])


if __name__ == "__main__":
    main()
