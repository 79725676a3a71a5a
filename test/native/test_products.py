"""Prefill's products through cuBLASLt: right, the same bits for any number of rows, and FP8 without its scales."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_case import NATIVE, K, assert_untouched, needs_gpu, poisoned, random_bf16, stream, torch

pytestmark = [
    needs_gpu,
    pytest.mark.skipif(NATIVE is not None and bool(NATIVE.products_reason()), reason="there is no cuBLASLt"),
]

MAX_ROWS = 600
SHAPES = [(48, 16), (208, 96), (1024, 576), (1536, 4096)]


def prepared(row_invariant: bool, fp8: bool, out_features: int, in_features: int, result: Any = None) -> Any:
    """The products, ready for that shape and a result in bf16 or `result`; skips where the GPU has none."""
    memory = torch.empty(K.MatrixProducts.DEVICE_BYTES, dtype=torch.uint8, device="cuda")
    products = K.MatrixProducts(memory, MAX_ROWS, row_invariant)
    dtype = torch.uint8 if fp8 else torch.bfloat16
    weight = torch.empty((out_features, in_features), dtype=dtype, device="cuda")
    x = torch.empty((MAX_ROWS, in_features), dtype=dtype, device="cuda")
    y = torch.empty((MAX_ROWS, out_features), dtype=result or torch.bfloat16, device="cuda")
    if not products.prepare(weight, x, y, stream=stream()):
        assert fp8 and torch.cuda.get_device_capability() < (8, 9)
        pytest.skip("this GPU has no FP8 products")
    return products


@pytest.mark.parametrize("row_invariant", [True, False])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_a_product_of_any_number_of_rows_is_fp64s(row_invariant: bool, out_features: int, in_features: int) -> None:
    products = prepared(row_invariant, False, out_features, in_features)
    weight, x = random_bf16(out_features, in_features, scale=in_features**-0.5), random_bf16(MAX_ROWS, in_features)
    wanted = x.double() @ weight.double().T
    for rows in (2, 3, 17, 99, 256, 511, MAX_ROWS):
        y = poisoned(rows, out_features, dtype=torch.bfloat16)
        products.run(x[:rows], weight, y, stream=stream())
        assert torch.allclose(y.double(), wanted[:rows], rtol=2**-7, atol=1e-3)
        assert_untouched(y)


@pytest.mark.parametrize("row_invariant", [True, False])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_a_result_in_fp32_is_rounded_nowhere(row_invariant: bool, out_features: int, in_features: int) -> None:
    products = prepared(row_invariant, False, out_features, in_features, torch.float32)
    weight, x = random_bf16(out_features, in_features, scale=in_features**-0.5), random_bf16(MAX_ROWS, in_features)
    wanted, whole = x.double() @ weight.double().T, poisoned(MAX_ROWS, out_features, dtype=torch.float32)
    products.run(x, weight, whole, stream=stream())
    for rows in (2, 16, 33, 64, 511, MAX_ROWS):
        y = poisoned(rows, out_features, dtype=torch.float32)
        products.run(x[:rows], weight, y, stream=stream())
        assert torch.allclose(y.double(), wanted[:rows], rtol=1e-4, atol=1e-5 * in_features**0.5)
        assert not row_invariant or torch.equal(y, whole[:rows])
        assert_untouched(y)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_a_rows_bits_do_not_depend_on_the_number_of_rows(fp8: bool, out_features: int, in_features: int) -> None:
    products = prepared(True, fp8, out_features, in_features)
    if fp8:
        weight, x = (
            torch.randn((n, in_features), device="cuda").to(torch.float8_e4m3fn).view(torch.uint8)
            for n in (out_features, MAX_ROWS)
        )
    else:
        weight, x = random_bf16(out_features, in_features), random_bf16(MAX_ROWS, in_features)
    wanted = poisoned(MAX_ROWS, out_features, dtype=torch.bfloat16)
    products.run(x, weight, wanted, stream=stream())
    for rows in (2, 3, 15, 16, 17, 64, 100, 129, 257, 400, 512, 513, MAX_ROWS - 1):
        for first in (0, MAX_ROWS - rows):
            y = poisoned(rows, out_features, dtype=torch.bfloat16)
            products.run(x[first : first + rows].clone(), weight, y, stream=stream())  # aligned to 256 bytes
            assert torch.equal(y, wanted[first : first + rows]), (rows, first)


@pytest.mark.parametrize("row_invariant", [True, False])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_an_fp8_product_is_that_of_the_numbers_without_their_scales(
    row_invariant: bool, out_features: int, in_features: int
) -> None:
    products = prepared(row_invariant, True, out_features, in_features)
    weight, x = (torch.randn((n, in_features), device="cuda").to(torch.float8_e4m3fn) for n in (out_features, MAX_ROWS))
    wanted = x.double() @ weight.double().T
    for rows in (2, 17, 300, MAX_ROWS):
        y = poisoned(rows, out_features, dtype=torch.bfloat16)
        products.run(x[:rows].view(torch.uint8), weight.view(torch.uint8), y, stream=stream())
        # The tensor cores keep about 13 bits of a sum: a few thousandths, far less than three-bit operands lose.
        assert float((y.double() - wanted[:rows]).norm() / wanted[:rows].norm()) < 2e-2
        assert_untouched(y)


def test_an_fp8_product_in_fp32_is_refused() -> None:
    products = prepared(True, False, 48, 16)
    weight, x = (torch.zeros(shape, device="cuda", dtype=torch.uint8) for shape in ((48, 16), (4, 16)))
    with pytest.raises(ValueError, match="y must be bf16 where the weight is fp8"):
        products.run(x, weight, torch.empty(4, 48, device="cuda"), stream=stream())


def test_a_shape_that_was_not_prepared_is_refused() -> None:
    products = prepared(True, False, 48, 16)
    with pytest.raises(RuntimeError, match="not prepared"):
        products.run(random_bf16(4, 32), random_bf16(48, 32), random_bf16(4, 48), stream=stream())
