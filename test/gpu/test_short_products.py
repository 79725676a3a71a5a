"""Every tile of the products that give a token the same bits alone and among others, once, for compute-sanitizer.

Rows are few and long: the models of test_short_run.py have no row that a warp reads in several windows. What the products
are is test_gemv.py's and test_gemm_int4.py's in test/native; here several tokens must get what each gets alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgellm_ros import native

NATIVE, NO_MODULE = native.import_module()
NO_GPU = NO_MODULE or native.unavailable_reason()
pytestmark = pytest.mark.skipif(bool(NO_GPU), reason=str(NO_GPU))
ROWS, GROUP = 40, 64


def on_device(dtype: str, values: np.ndarray) -> Any:
    tensor = NATIVE.Tensor(dtype, list(values.shape))
    tensor.copy_from(values)
    return tensor


def random_bf16(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """Bits of numbers of either sign from 0.5 to 2."""
    return (generator.integers(0x3F00, 0x4000, shape) | generator.integers(0, 2, shape) << 15).astype(np.uint16)


def make_weight(
    form: str, cols: int, generator: np.random.Generator, rows: int = ROWS, group: int = GROUP
) -> tuple[Any, ...]:
    """Random bits that are finite numbers."""
    scales: Any = None
    if form == "bf16":
        data = on_device("bfloat16", random_bf16(generator, rows, cols))
    elif form == "fp16":
        data = on_device("float16", generator.standard_normal((rows, cols)).astype(np.float16))
    elif form == "fp8":
        data = on_device("uint8", generator.integers(0, 120, (rows, cols)).astype(np.uint8))
        scales = on_device("float32", np.ones(rows, np.float32))
    else:
        size = NATIVE.kernels.int4_packed_data_bytes(rows, cols)
        data = on_device("uint8", generator.integers(0, 256, size).astype(np.uint8))
        halves = np.full(NATIVE.kernels.int4_packed_scales_bytes(rows, cols, group) // 2, 0.01, np.float16)
        scales = on_device("uint8", halves.view(np.uint8))
    return (getattr(NATIVE.WeightFormat, form), data, scales, rows, cols, group if form == "int4" else 0)


@pytest.mark.parametrize("form", ["bf16", "fp16", "fp8", "int4"])
def test_every_path_once(form: str) -> None:
    generator = np.random.default_rng(5)
    kernels = NATIVE.kernels
    for cols in (1104, 9296) if form != "int4" else (1088, 9280):  # the first pairs end within a unit
        weight = make_weight(form, cols, generator)
        bits = random_bf16(generator, 8, cols)
        norm = on_device("bfloat16", random_bf16(generator, cols))
        in_fp32 = (bits.astype(np.uint32) << 16 | 0x5A5A).view(np.float32)  # what rounding takes is not zero
        for gain, is_wide in ((None, False), (norm, False), (norm, True))[: 3 if form == "bf16" else 2]:
            for tile in range(kernels.gemv_num_tiles(weight, 1, batch_invariant=True)):
                results = []
                for tokens in (slice(0, 1), slice(0, 3), slice(0, 8)):
                    x = on_device("bfloat16", np.ascontiguousarray(bits[tokens]))
                    out = on_device("float32", np.full((len(bits[tokens]), ROWS), np.nan, np.float32))
                    x_f32 = on_device("float32", np.ascontiguousarray(in_fp32[tokens])) if is_wide else None
                    kernels.gemv(weight, x, out, gain=gain, x_f32=x_f32, tile=tile, batch_invariant=True)
                    results.append(out.to_numpy())
                assert np.isfinite(results[-1]).all(), (cols, tile, is_wide)
                for result in results[:-1]:
                    assert np.array_equal(result, results[-1][: len(result)]), (cols, tile, len(result))
        if form == "int4":
            for rows, group, gate_up in ((ROWS, 64, False), (138, 16, True), (ROWS, 32, False)):
                multiply_many(make_weight(form, cols, generator, rows, group), bits, gate_up)


def multiply_many(weight: tuple[Any, ...], bits: np.ndarray, gate_up: bool) -> None:
    """Prompts' products with the packed weight: 1, 8 and 80 tokens, or as many as the tile has, every tile."""
    kernels = NATIVE.kernels
    many = np.tile(bits, (10, 1))
    for tile, (_, most, split) in enumerate(kernels.GEMM_INT4_TILES):
        if split and not kernels.has_gemm_int4_split(most, weight[-1]):
            continue
        count = most if split else len(many)
        results = []
        for tokens in (1, 8, count):
            x = on_device("bfloat16", np.ascontiguousarray(many[:tokens]))
            y = on_device("bfloat16", np.full((tokens, weight[3]), 0x7FC0, np.uint16))
            kernels.gemm_int4(weight, gate_up, x, y, tile)
            results.append(y.to_numpy())
        assert np.isfinite((results[-1].astype(np.uint32) << 16).view(np.float32)).all(), tile
        for result in results[:-1]:
            assert np.array_equal(result, results[-1][: len(result)]), (tile, len(result))
        assert np.array_equal(results[-1][:8], results[-1][count - 8 :]), tile
