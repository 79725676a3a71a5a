"""Which product kernel would serve a shape on GPUs that are not here: one that can run there, alike alone and among others."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from edgellm_ros import native

NATIVE, NO_MODULE = native.import_module()
pytestmark = pytest.mark.skipif(bool(NO_MODULE), reason=NO_MODULE)

# Multiprocessors, and a block's shared memory at most (CUDA C++ Programming Guide, compute capabilities).
GPUS = {
    "A100": (108, 163), "Orin": (16, 163), "RTX 4090": (128, 99), "H100": (132, 227), "Thor": (20, 227), "RTX 5090": (170, 99),
}  # fmt: skip
FORMATS = ["bf16", "fp16", "fp8", "int8", "int4", "int8_offset", "fp8_blocks"]
ROWS = (1, 99, 6144, 151936)
COLS = (64, 576, 2048, 2560, 4096, 8192, 9728, 14336)
TOKENS = (1, 2, 4, 5, 8, 9, 16)


def plan(gpu: str, form: str, **shape: Any) -> dict[str, Any]:
    num_sms, kilobytes = GPUS[gpu]
    result: dict[str, Any] = NATIVE.kernels.plan_gemv(
        getattr(NATIVE.WeightFormat, form), num_sms=num_sms, max_shared_bytes=kilobytes * 1024, **shape
    )
    return result


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("form", FORMATS)
def test_every_shape_has_a_kernel_whose_blocks_the_gpu_has_room_for(gpu: str, form: str) -> None:
    for rows in ROWS:
        for cols in COLS:
            for tokens in TOKENS:
                for invariant, wide in ((False, False), (False, True), (True, False), (True, True)):
                    shape = {"rows": rows, "cols": cols, "num_tokens": tokens, "batch_invariant": invariant}
                    shape |= {"wide": wide, "normed": wide}
                    count = plan(gpu, form, **shape)["num_tiles"]
                    assert count >= 1, shape
                    for tile in (-1, *range(count)):
                        chosen = plan(gpu, form, tile=tile, **shape)
                        assert chosen["shared_bytes"] <= GPUS[gpu][1] * 1024, (shape, tile, chosen)
                        assert 1 <= chosen["warps"] <= 32


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_several_tokens_get_the_warps_that_one_has(gpu: str, form: str, group: int) -> None:
    """A token's sums depend on them, and of int8 and fp8 in blocks on the whole configuration."""
    if form == "fp8_blocks" and group < 64:
        pytest.skip("fp8_blocks needs groups of 64 or 128")
    for rows in ROWS:
        for cols in (cols for cols in COLS if cols % group == 0):
            tiles = plan(gpu, form, rows=rows, cols=cols, group=group, batch_invariant=True)["num_tiles"]
            for tile, normed in itertools.product((-1, *range(tiles)), (False, True)):
                shape = {"rows": rows, "cols": cols, "group": group, "tile": tile, "batch_invariant": True, "normed": normed}
                alone = plan(gpu, form, **shape)
                for tokens in TOKENS:
                    among = plan(gpu, form, num_tokens=tokens, **shape)
                    assert among["warps"] == alone["warps"] and among["num_tiles"] == alone["num_tiles"], (shape, tokens)
                    if alone["family"] == "fma":
                        assert (among["family"], among["config"]) == ("several" if tokens > 1 else "fma", alone["config"])


@pytest.mark.parametrize("shape", [(2048, 2048), (2560, 4096), (4096, 4096)])
def test_attentions_product_in_16_bits_has_blocks_of_four_rows(shape: tuple[int, int]) -> None:
    rows, cols = shape
    for form in ("bf16", "fp16"):
        added = plan("H100", form, rows=rows, cols=cols, epilogue=NATIVE.kernels.Epilogue.residual)
        stored = plan("H100", form, rows=rows, cols=cols, epilogue=NATIVE.kernels.Epilogue.store_f32)
        assert (added["family"], added["rows_per_block"], stored["rows_per_block"]) == ("fma", 4, 8)


def test_a_small_block_of_shared_memory_takes_eight_warps() -> None:
    long_rows = {"rows": 4096, "cols": 14336, "batch_invariant": True}
    assert plan("H100", "bf16", **long_rows)["warps"] == 16
    assert plan("RTX 4090", "bf16", **long_rows)["warps"] == 8


@pytest.mark.parametrize("form", ["bf16", "fp16", "fp8"])
def test_a_block_keeps_the_x_of_several_tokens_where_it_is_normed_and_there_are_rows_for_it(form: str) -> None:
    def family(gpu: str, rows: int, cols: int, tokens: int = 8, normed: bool = True, invariant: bool = True) -> str:
        shape = {"rows": rows, "cols": cols, "num_tokens": tokens, "batch_invariant": invariant, "normed": normed}
        return str(plan(gpu, form, wide=normed, **shape)["family"])

    for invariant, tokens in ((False, 2), (False, 8), (True, 2), (True, 8), (True, 16)):
        for rows, cols in ((16384, 2048), (28672, 4096), (128256, 4096)):  # gate and up of 1B and 8B, and the head
            assert family("H100", rows, cols, tokens, invariant=invariant) == "resident"
        qkv = "ring" if form == "fp8" else "resident"  # fewer rows, which 16 warps have for one token
        assert family("H100", 6144, 4096, tokens, invariant=invariant) == qkv
        assert family("H100", 3072, 2048, tokens, invariant=invariant) == "ring", "too few rows"
        assert family("H100", 28672, 4096, tokens, False, invariant) == "ring", "without a norm x is not worth it"
    assert family("H100", 28672, 4096, 1) in ("once", "ring")
    assert family("Orin", 16384, 2048) == "resident" and family("RTX 4090", 16384, 2048) == "ring", "no room"
