"""Prefill's products with int4 weights: as they are stored, every tile, and by way of a copy in bf16 and cuBLASLt.

    python3 bench/bench_gemm_int4.py [--shape 8b] [--tokens 32 128 512]

Tiles are rows x tokens of a block; s: its warps divide the input features. "to bf16" is the copy of the whole weight,
"cuBLASLt" the product with it, from memory; the executor makes the copy in parts that stay in the L2 cache, half of
them beside a product, so that both together take less there than here.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench_gemv import SHAPES, random_weight
from bench_prefill import time_dequantise_us, time_product_us
from kernel_timing import K, measure_us, print_machine, run_script, torch

BYTES_IN_FLIGHT = 1 << 28  # of distinct weights a measurement: more than any L2 cache


def main() -> None:
    """One line a matrix and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["1b", "8b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 32, 64, 128, 256, 512, 2048])
    parser.add_argument("--group", type=int, choices=(16, 32, 64, 128), default=64)
    args = parser.parse_args()
    print_machine()
    tiles = " ".join(f"{rows}x{tokens}{'s' * split}".rjust(8) for rows, tokens, split in K.GEMM_INT4_TILES)
    print(f"matrix          rows   cols tokens  chosen us TFLOP/s | us by tile: {tiles} | to bf16  cuBLASLt us")
    for shape in args.shape:
        for name, (rows, cols) in SHAPES[shape].items():
            if name == "head":
                continue
            gate_up = name == "gate_up"
            one, num_bytes = random_weight("int4", rows, cols, args.group)
            more = BYTES_IN_FLIGHT // num_bytes
            weights = [one] + [random_weight("int4", rows, cols, args.group)[0] for _ in range(more)]
            wide, _ = time_dequantise_us("int4", rows, cols, gate_up, args.group)
            for tokens in args.tokens:
                times = [time_tile(weights, gate_up, tokens, tile) for tile in range(-1, len(K.GEMM_INT4_TILES))]
                rate = 2.0 * rows * cols * tokens / times[0] * 1e-6
                each = " ".join(f"{us:8.1f}" if us else " " * 8 for us in times[1:])
                peer = time_product_us(rows, cols, tokens, False)
                print(
                    f"{shape} {name:9s} {rows:8d} {cols:6d} {tokens:6d}  {times[0]:9.1f} {rate:7.1f} |             "
                    f"{each} | {wide:7.1f} {peer:9.1f}",
                    flush=True,
                )


def time_tile(weights: list[tuple[Any, ...]], gate_up: bool, tokens: int, tile: int) -> float:
    """Microseconds of one product, each with another weight; 0.0 where the tile does not take it."""
    rows, cols, group = weights[0][3:]
    _, most, split = K.GEMM_INT4_TILES[tile]
    if tile >= 0 and split and (tokens > most or not K.has_gemm_int4_split(most, group)):
        return 0.0
    x = torch.randn((tokens, cols), device="cuda").to(torch.bfloat16)
    y = torch.zeros((tokens, rows), device="cuda", dtype=torch.bfloat16)

    def launch(index: int) -> Any:
        weight = weights[index % len(weights)]
        return lambda stream: K.gemm_int4(weight, gate_up, x, y, tile, stream=stream, row_invariant=False)

    return measure_us([launch(i) for i in range(max(len(weights), 8))])


if __name__ == "__main__":
    run_script(main)
