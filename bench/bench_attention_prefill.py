"""Prefill attention over an fp16 cache: TFLOP/s (causal half counted) beside torch's scaled_dot_product_attention."""

from __future__ import annotations

import argparse

from kernel_timing import K, measure_us, print_machine, run_script, torch

HEADS = {  # query heads, KV heads, head_dim
    "1b": (32, 8, 64), "8b": (32, 8, 128), "gemma3": (4, 1, 256), "1.8b": (32, 8, 80), "phi3": (32, 32, 96)
}  # fmt: skip
TOKENS = (512, 2048, 8192)


def main() -> None:
    """One line a shape and number of tokens."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print_machine()
    print("shape  tokens       us  TFLOP/s | torch us  TFLOP/s")
    for shape, (heads, kv_heads, head_dim) in HEADS.items():
        for tokens in TOKENS:
            kv = torch.randn((1, 2, kv_heads, tokens, head_dim), device="cuda", dtype=torch.float16)
            q = torch.randn((tokens, heads * head_dim), device="cuda", dtype=torch.bfloat16)
            out = torch.empty_like(q)
            starts, slots, positions = (
                torch.tensor(v, device="cuda", dtype=torch.int32) for v in ([0, tokens], [0], [0])
            )

            def ours(stream: int) -> None:
                K.prefill_attention(q, kv, starts, slots, positions, out, tokens, head_dim**-0.5, stream=stream)  # noqa: B023

            q4 = q.view(1, tokens, heads, head_dim).transpose(1, 2).contiguous()
            k4, v4 = (kv[:, i].to(q.dtype).repeat_interleave(heads // kv_heads, 1) for i in range(2))

            def theirs(_: int) -> None:
                torch.nn.functional.scaled_dot_product_attention(q4, k4, v4, is_causal=True)  # noqa: B023

            flop = 2 * tokens * tokens * heads * head_dim
            us, torch_us = measure_us([ours] * 4), measure_us([theirs] * 4)
            print(
                f"{shape:6s} {tokens:6d} {us:8.1f} {flop / us * 1e-6:8.1f} | "
                f"{torch_us:8.1f} {flop / torch_us * 1e-6:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    run_script(main)
