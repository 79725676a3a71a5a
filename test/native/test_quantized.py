"""A weight that was repacked or quantised on the device still stands for the same numbers."""

from __future__ import annotations

import pytest
from kernel_case import AWKWARD, K, assert_untouched, make_weight, needs_gpu, poisoned, random_bf16, stream, torch

pytestmark = needs_gpu


@pytest.mark.parametrize("form", ["bf16", "fp16", "fp8", "int8", "int4", "int8_offset", "fp8_blocks"])
@pytest.mark.parametrize("rows", AWKWARD)
@pytest.mark.parametrize(("cols", "group"), [(16, 16), (96, 32), (576, 64), (1024, 128)])
def test_dequantised_weights_are_the_stored_ones_in_their_rows_order(
    form: str, rows: int, cols: int, group: int
) -> None:
    weight = make_weight(form, rows, cols, group)
    first = rows // 3
    out = poisoned(rows - first, cols, dtype=torch.bfloat16)
    K.dequantize(weight.view, False, first, out, stream=stream())
    # fp8 and the integers times a scale are rounded twice at most: fp32, then bf16.
    assert torch.allclose(out.double(), weight.values[first:], rtol=2**-8, atol=1e-12)
    assert_untouched(out)


@pytest.mark.parametrize("half", [1, 19, 96])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_interleaved_gate_and_up_rows_come_back_in_their_own_order(half: int, group: int) -> None:
    weight = make_weight("int4", 2 * half, 192, group, gate_up=True)
    out = poisoned(2 * half, 192, dtype=torch.bfloat16)
    K.dequantize(weight.view, True, 0, out, stream=stream())
    assert torch.allclose(out.double(), weight.values, rtol=2**-8, atol=1e-12)
    assert_untouched(out)


@pytest.mark.parametrize("rows", AWKWARD)
def test_fp8_rows_keep_their_largest_number_and_three_bits_of_the_others(rows: int) -> None:
    dense = random_bf16(rows, 208)
    dense[0] = 0
    out = poisoned(rows, 208, dtype=torch.uint8)
    scales = torch.full((rows,), float("nan"), device="cuda")
    K.quantize_fp8(dense, out, scales, stream=stream())
    wanted_scales = torch.where(dense.float().abs().amax(1) > 0, dense.float().abs().amax(1) / 448, 1.0)
    assert torch.allclose(scales, wanted_scales, rtol=1e-6)
    back = out.view(torch.float8_e4m3fn).float() * scales[:, None]
    assert bool(((back - dense.float()).abs() <= dense.float().abs() / 15 + scales[:, None] * 2**-9).all())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("count", [*AWKWARD, 70_001])
def test_numbers_are_rounded_to_the_nearest_bf16(count: int, dtype: str) -> None:
    values = (torch.randn(count, device="cuda") * 100).to(getattr(torch, dtype))
    values[0] = 1 + 2**-8  # halfway between two: to the even one
    out = poisoned(count, dtype=torch.bfloat16)
    K.convert_to_bf16(values, out, stream=stream())
    assert torch.equal(out, values.to(torch.bfloat16))
    assert_untouched(out)
