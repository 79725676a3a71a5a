"""Bandwidth of the GEMV kernels on the matrices of Llama-3.2-1B, Qwen3-4B and Llama-3.1-8B, every tile.

    python3 bench/bench_gemv.py [--shape 1b 8b] [--weights bf16 fp8] [--tokens 1 8]

The share is the weight bytes (with scales) over the time, in relation to a kernel that only reads.
"""

from __future__ import annotations

import argparse
from typing import Any

from kernel_timing import NATIVE, K, measure_us, print_machine, run_script, torch

SHAPES = {  # rows, cols
    "1b": {"qkv": (3072, 2048), "o": (2048, 2048),
           "gate_up": (16384, 2048), "down": (2048, 8192), "head": (128256, 2048)},
    "4b": {"qkv": (6144, 2560), "o": (2560, 4096),
           "gate_up": (19456, 2560), "down": (2560, 9728), "head": (151936, 2560)},
    "8b": {"qkv": (6144, 4096), "o": (4096, 4096),
           "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096)},
}  # fmt: skip
FORMATS = ("bf16", "fp16", "fp8", "int8", "int4", "int8_offset", "fp8_blocks")
BYTES_IN_FLIGHT = 1 << 29  # of distinct weights a measurement: ten times the L2


def random_weight(form: str, rows: int, cols: int, group: int) -> tuple[tuple[Any, ...], int]:
    """(what the bindings take, its bytes): random bits that are finite numbers."""
    fmt = getattr(NATIVE.WeightFormat, form)
    scales: Any = None
    if form in ("bf16", "fp16"):
        data = torch.randn((rows, cols), device="cuda", dtype=torch.bfloat16 if form == "bf16" else torch.float16)
    elif form == "fp8":
        data = torch.randint(0, 120, (rows, cols), device="cuda", dtype=torch.uint8)
        scales = torch.ones(rows, device="cuda")
    elif form == "fp8_blocks":
        data = torch.randint(0, 120, (rows, cols), device="cuda", dtype=torch.uint8)
        scales = torch.ones((rows, cols // group), device="cuda")
    elif form == "int8_offset":
        data = torch.randint(-127, 128, (rows, cols), device="cuda", dtype=torch.int8)
        scales = torch.full((rows, cols // group, 2), 0.01, device="cuda", dtype=torch.float16)
    elif form == "int8":
        data = torch.randint(-127, 128, (rows, cols), device="cuda", dtype=torch.int8)
        scales = torch.full((rows, cols // group), 0.01, device="cuda", dtype=torch.float16)
    else:
        data = torch.randint(0, 256, (K.int4_packed_data_bytes(rows, cols),), device="cuda", dtype=torch.uint8)
        scales = torch.full(
            (K.int4_packed_scales_bytes(rows, cols, group) // 2,), 0.01, device="cuda", dtype=torch.float16
        )
        scales = scales.view(torch.uint8)
    num_bytes = data.numel() * data.element_size() + (
        scales.numel() * scales.element_size() if scales is not None else 0
    )
    return (fmt, data, scales, rows, cols, group), num_bytes


def main() -> None:
    """One line a matrix, format and number of tokens; the fastest tile, and the one that is chosen by shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["1b", "8b"])
    parser.add_argument("--weights", nargs="+", choices=FORMATS, default=["bf16", "fp8", "int8", "int4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--no-pdl", action="store_true")
    args = parser.parse_args()
    read = print_machine()
    print("matrix          rows   cols     weights tokens      us     GB/s  share  tile | chosen us  all tiles us")
    for shape in args.shape:
        for name, (rows, cols) in SHAPES[shape].items():
            for form in args.weights:
                _, num_bytes = one = random_weight(form, rows, cols, args.group)
                weights = [one[0]] + [
                    random_weight(form, rows, cols, args.group)[0] for _ in range(BYTES_IN_FLIGHT // num_bytes)
                ]
                for tokens in args.tokens:
                    times = {
                        tile: time_tile(name, weights, tokens, tile, not args.no_pdl)
                        for tile in range(-1, K.gemv_num_tiles(weights[0], tokens))
                    }
                    best = min((t for t in times if t >= 0), key=lambda t: times[t])
                    rate = num_bytes / times[best] * 1e-3
                    rest = " ".join(f"{t:.2f}" for tile, t in times.items() if tile >= 0)
                    print(
                        f"{shape} {name:9s} {rows:8d} {cols:6d} {form:>11s} {tokens:6d} {times[best]:8.2f} {rate:8.0f} "
                        f"{rate / read:6.1%} {best:5d} | {times[-1]:8.2f}   {rest}",
                        flush=True,
                    )


def time_tile(name: str, weights: list[tuple[Any, ...]], tokens: int, tile: int, pdl: bool) -> float:
    """Microseconds of one product as the decode step makes it."""
    rows, cols = weights[0][3], weights[0][4]
    x = torch.randn((tokens, cols), device="cuda").to(torch.bfloat16)
    gain = torch.ones(cols, device="cuda", dtype=torch.bfloat16) if name in ("qkv",
           "gate_up", "head") else None
    f32 = torch.zeros((tokens, rows), device="cuda")
    bf16 = torch.zeros((tokens, rows // 2 if name == "gate_up" else rows), device="cuda", dtype=torch.bfloat16)
    more: dict[str, Any] = {"gain": gain, "tile": tile}
    if gain is not None and weights[0][0] == NATIVE.WeightFormat.bf16:
        more["x_f32"] = x.float()
    epilogue, out = K.Epilogue.store_f32, f32
    if name == "gate_up":
        epilogue, out = K.Epilogue.swiglu, bf16
    elif name in ("o", "down"):
        epilogue, more["out_bf16"] = K.Epilogue.residual, bf16
    elif name == "head":
        epilogue = K.Epilogue.logits
        blocks = K.gemv_num_blocks(weights[0], tokens, epilogue, tile, normed=True)
        more["block_max"] = torch.zeros((tokens, blocks), dtype=torch.int64, device="cuda")
    count = max(len(weights), 8)

    def launch(index: int) -> Any:
        weight = weights[index % len(weights)]
        return lambda stream: K.gemv(weight, x, out, epilogue, stream=stream, pdl=pdl and index > 0, **more)

    return measure_us([launch(i) for i in range(count)])


if __name__ == "__main__":
    run_script(main)
