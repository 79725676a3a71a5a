"""Decode attention: microseconds and GB/s of keys and values, by shape, batch, context and cache format.

    python3 bench/bench_attention_decode.py [--splits] [--shape 8b] [--contexts 512 4096 16384]

A call is one layer of a decode step: 32 of them or more in a CUDA graph, with programmatic dependent launch, each over
another cache, as many as L2 cannot hold. "added" is the time over the first context's, in relation to what reading the
added bytes takes at the bandwidth measured in the run. --splits times other numbers of splits beside, each in a block
of its own, and the decoder's with one, two and four of them a block.
"""

from __future__ import annotations

import argparse
from typing import Any

from kernel_timing import K, measure_us, print_machine, run_script, torch

# Query heads, KV heads, head_dim.
SHAPES = {
    "8b": (32, 8, 128), "1b": (32, 8, 64), "0.5b": (14, 2, 64), "gemma3": (4, 1, 256), "phi3": (32, 32, 96),
    "1.8b": (32, 8, 80),
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}
TRIED = (1, 2, 4, 8, 16, 32, 64)  # most_splits
EACH = (1, 2, 4)  # splits_per_block; 8 does not fit everywhere
NUM_CALLS = 32  # at least
FEWEST_BYTES, MOST_BYTES = 160 << 20, 8 << 30  # of all caches together


def main() -> None:
    """One line a shape, batch, context and format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", action="store_true", help="also other splits, and other splits_per_block")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 4096, 16384])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--cache", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args()
    read = print_machine()
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    print(
        "shape  batch context cache  splits        us     GB/s  share  added | us by most_splits | by splits_per_block"
    )
    for shape in options.shape:
        heads, kv_heads, head_dim = SHAPES[shape]
        most = K.decode_attention_most_splits(kv_heads, num_sms)
        for batch in options.batch:
            first: dict[str, tuple[float, int]] = {}  # microseconds and bytes of the first context
            for context in options.contexts:
                for form in options.cache:
                    dtype = DTYPES[form]
                    case = (heads, kv_heads, head_dim, context, batch, dtype)
                    us = time_us(*case, most, 0)
                    splits = K.decode_attention_splits(context, most)
                    others = ""
                    if options.splits:
                        others = " ".join(f"{m}:{time_us(*case, m, 1):.2f}" for m in TRIED if m <= 2 * splits)
                        others += " | " + " ".join(f"{e}:{time_us(*case, most, e):.2f}" for e in EACH)
                    num_bytes = 2 * batch * context * kv_heads * head_dim * dtype.itemsize
                    rate = num_bytes / us * 1e-3
                    us_then, bytes_then = first.setdefault(form, (us, num_bytes))
                    more = num_bytes - bytes_then
                    added = f"{(us - us_then) / (more / read * 1e-3):6.2f}" if more else "     -"
                    print(
                        f"{shape:6s} {batch:5d} {context:7d} {form:5s} {splits:7d} {us:9.2f} {rate:8.0f} "
                        f"{rate / read:6.1%} {added} | {others}",
                        flush=True,
                    )


def time_us(
    heads: int, kv_heads: int, head_dim: int, context: int, batch: int, dtype: Any, most_splits: int, each: int
) -> float:
    """Microseconds of one call."""
    one = 2 * batch * kv_heads * context * head_dim * dtype.itemsize
    num_calls = max(NUM_CALLS, -(-FEWEST_BYTES // one))
    num_caches = max(2, min(num_calls, MOST_BYTES // one))
    shape = (batch, 2, kv_heads, context, head_dim)
    if dtype == torch.uint8:
        caches = [torch.randn(shape, device="cuda").to(torch.float8_e4m3fn).view(dtype) for _ in range(num_caches)]
    else:
        caches = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(num_caches)]
    qkv = torch.randn((batch, (heads + 2 * kv_heads) * head_dim), device="cuda")
    slots = torch.arange(batch, device="cuda", dtype=torch.int32)
    positions = torch.full((batch,), context - 1, device="cuda", dtype=torch.int32)
    cos, sin = (torch.ones((context, head_dim // 2), device="cuda") for _ in range(2))
    out = torch.empty((batch, heads * head_dim), device="cuda", dtype=torch.bfloat16)
    size = K.decode_attention_workspace_bytes(batch, heads, head_dim)
    workspace = torch.zeros(size, device="cuda", dtype=torch.uint8)

    def launch(index: int) -> Any:
        return lambda stream: K.decode_attention(
            qkv, caches[index % num_caches], slots, positions, cos, sin, out, heads, head_dim**-0.5,
            most_splits=most_splits, most_attended=context, splits_per_block=each, workspace=workspace,
            stream=stream, pdl=index > 0,
        )  # fmt: skip

    return measure_us([launch(i) for i in range(num_calls)])


if __name__ == "__main__":
    run_script(main)
