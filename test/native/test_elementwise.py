"""Prefill's small kernels against fp64."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_case import (
    AWKWARD,
    NATIVE,
    K,
    activate,
    assert_untouched,
    needs_gpu,
    poisoned,
    random_bf16,
    stream,
    torch,
)

pytestmark = needs_gpu


@pytest.mark.parametrize("tokens", AWKWARD)
@pytest.mark.parametrize("hidden", [16, 576, 4096])
def test_rms_norm(tokens: int, hidden: int) -> None:
    x, gain = torch.randn((tokens, hidden), device="cuda"), random_bf16(hidden)
    out = poisoned(tokens, hidden, dtype=torch.bfloat16)
    K.rms_norm(x, gain, 1e-5, out, stream=stream())
    wanted = x.double() * torch.rsqrt((x.double() ** 2).mean(1, keepdim=True) + 1e-5) * gain.double()
    assert torch.allclose(out.double(), wanted, rtol=2**-8, atol=1e-9)
    assert_untouched(out)


@pytest.mark.parametrize("tokens", AWKWARD)
@pytest.mark.parametrize("hidden", [24, 576, 4096, 9000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_residual_addition_and_the_norm_of_the_sum(tokens: int, hidden: int, with_bias: bool) -> None:
    delta, gain = random_bf16(tokens, hidden), random_bf16(hidden)
    bias = torch.randn(hidden, device="cuda") if with_bias else None
    before = torch.randn((tokens, hidden), device="cuda")
    residual = before.clone()
    copy, normed = (poisoned(tokens, hidden, dtype=torch.bfloat16) for _ in range(2))
    K.residual_norm(delta, residual, bias, copy, gain, 1e-5, normed, stream=stream())
    wanted = before + delta.float() + (bias if with_bias else 0)
    assert torch.allclose(residual, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(copy, residual.to(torch.bfloat16))
    scaled = residual.double() * torch.rsqrt((residual.double() ** 2).mean(1, keepdim=True) + 1e-5) * gain.double()
    assert torch.allclose(normed.double(), scaled, rtol=2**-8, atol=1e-9)
    assert_untouched(copy)
    assert_untouched(normed)


def rms(x: Any) -> Any:
    return torch.rsqrt((x**2).mean(1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("tokens", AWKWARD)
@pytest.mark.parametrize("hidden", [24, 1152, 2560, 5376, 9000])
@pytest.mark.parametrize("as_f32", [False, True])
@pytest.mark.parametrize("with_next", [False, True])
def test_what_is_added_is_normed_first_where_a_gain_for_it_is_given(
    tokens: int, hidden: int, as_f32: bool, with_next: bool
) -> None:
    """Decoding adds fp32 sums and has no norm behind; prompts add bf16 with a bias and go on with the next norm."""
    delta, delta_gain, gain = random_bf16(tokens, hidden, scale=5.0), random_bf16(hidden), random_bf16(hidden)
    bias = None if as_f32 else torch.randn(hidden, device="cuda")
    before = torch.randn((tokens, hidden), device="cuda")
    residual = before.clone()
    copy, normed = (poisoned(tokens, hidden, dtype=torch.bfloat16) for _ in range(2))
    K.residual_norm(
        delta.float() if as_f32 else delta, residual, bias, copy, gain if with_next else None, 1e-5,
        normed if with_next else None, stream=stream(), delta_gain=delta_gain,
    )  # fmt: skip
    added = delta.double() + (0 if bias is None else bias.double())
    wanted = before.double() + added * rms(added) * delta_gain.double()
    assert torch.allclose(residual.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(copy, residual.to(torch.bfloat16))
    if with_next:
        scaled = residual.double() * rms(residual.double()) * gain.double()
        assert torch.allclose(normed.double(), scaled, rtol=2**-8, atol=1e-9)
    else:
        assert bool(torch.isnan(normed).all())
    assert_untouched(copy)
    assert_untouched(normed)


@pytest.mark.parametrize("tokens", AWKWARD)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_swiglu(activation: str, tokens: int, with_bias: bool) -> None:
    gate_up = random_bf16(tokens, 2 * 200, scale=3.0)
    gate_up[0, :6] = torch.tensor([-300.0, 300.0, -11.0, -1e-3, 0.0, 3e4])  # where a sigmoid overflows or is 1
    bias = torch.randn(400, device="cuda") if with_bias else None
    out = poisoned(tokens, 200, dtype=torch.bfloat16)
    K.swiglu(gate_up, out, bias, stream=stream(), activation=getattr(NATIVE.Activation, activation))
    y = gate_up.double() + (bias.double() if with_bias else 0)
    wanted = activate(activation, y[:, :200]) * y[:, 200:]
    assert torch.allclose(out.double(), wanted, rtol=2**-7, atol=1e-6)
    assert_untouched(out)


@pytest.mark.parametrize("tokens", AWKWARD)
@pytest.mark.parametrize("cols", [16, 576, 4096])
def test_an_input_in_another_order_times_a_factor(tokens: int, cols: int) -> None:
    x, order = random_bf16(tokens, cols), torch.randperm(cols, device="cuda")
    factor = torch.rand(cols, device="cuda") + 0.5
    for with_order, with_factor in ((True, True), (True, False), (False, True)):
        out = poisoned(tokens, cols, dtype=torch.bfloat16)
        K.map_input(
            x, out, order.to(torch.int32) if with_order else None, factor if with_factor else None, stream=stream()
        )
        wanted = x[:, order] if with_order else x
        wanted = (wanted.float() * factor).to(torch.bfloat16) if with_factor else wanted
        assert torch.equal(out, wanted)
        assert_untouched(out)


def fp8_values(data: Any, scales: Any) -> Any:
    return data.view(torch.float8_e4m3fn).double() * scales.double()[:, None]


def assert_fp8(data: Any, scales: Any, wanted: Any) -> None:
    """Three bits of mantissa, each row's largest number at 448."""
    largest = wanted.abs().amax(1)
    assert torch.allclose(scales.double(), largest / 448, rtol=2**-7)
    slack = wanted.abs() / 14 + scales.double()[:, None] * 2**-9
    assert bool(((fp8_values(data, scales) - wanted).abs() <= slack).all())


def product_scales(tokens: int, width: int) -> tuple[Any, Any]:
    return torch.rand(tokens, device="cuda") + 0.5, torch.rand(width, device="cuda") + 0.1


@pytest.mark.parametrize("tokens", AWKWARD)
@pytest.mark.parametrize("hidden", [24, 576, 4096, 9000])
@pytest.mark.parametrize("output_norm", [False, True])
def test_the_norm_rounds_to_fp8_and_applies_a_products_scales(output_norm: bool, tokens: int, hidden: int) -> None:
    delta, gain, bias = random_bf16(tokens, hidden), random_bf16(hidden), torch.randn(hidden, device="cuda")
    rows, columns = product_scales(tokens, hidden)
    before = torch.randn((tokens, hidden), device="cuda")
    residual = before.clone()
    added = delta.double() * rows.double()[:, None] * columns.double() + bias.double()
    delta_gain = random_bf16(hidden) if output_norm else None
    if delta_gain is not None:
        added = added * rms(added) * delta_gain.double()
    wanted = before.double() + added
    normed = poisoned(tokens, hidden, dtype=torch.uint8)
    scales = rows.clone()  # the new scales may lie where the old ones were
    K.residual_norm(
        delta, residual, bias, None, gain, 1e-5, stream=stream(), row_scales=scales, column_scales=columns,
        normed_fp8=normed, normed_scales=scales, delta_gain=delta_gain,
    )  # fmt: skip
    assert torch.allclose(residual.double(), wanted, rtol=1e-5, atol=1e-5)
    scaled = wanted * torch.rsqrt((wanted**2).mean(1, keepdim=True) + 1e-5) * gain.double()
    assert_fp8(normed, scales, scaled)
    assert_untouched(normed)


@pytest.mark.parametrize("tokens", AWKWARD)
@pytest.mark.parametrize("width", [8, 200, 14336])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_swiglu_rounds_to_fp8_and_applies_a_products_scales(activation: str, tokens: int, width: int) -> None:
    kind = getattr(NATIVE.Activation, activation)
    gate_up, bias = random_bf16(tokens, 2 * width, scale=3.0), torch.randn(2 * width, device="cuda")
    rows, columns = product_scales(tokens, 2 * width)
    y = gate_up.double() * rows.double()[:, None] * columns.double() + bias.double()
    wanted = activate(activation, y[:, :width]) * y[:, width:]
    wide = poisoned(tokens, width, dtype=torch.bfloat16)
    K.swiglu(gate_up, wide, bias, stream=stream(), row_scales=rows, column_scales=columns, activation=kind)
    assert torch.allclose(wide.double(), wanted, rtol=2**-7, atol=1e-6)
    out = poisoned(tokens, width, dtype=torch.uint8)
    scales = rows.clone()
    K.swiglu(
        gate_up, out, bias, stream=stream(), row_scales=scales, column_scales=columns, out_scales=scales,
        activation=kind,
    )  # fmt: skip
    assert_fp8(out, scales, wanted)
    assert_untouched(out)


def test_rows_of_zeros_have_a_scale_and_stay_zeros() -> None:
    zeros = torch.zeros((3, 64), device="cuda", dtype=torch.bfloat16)
    out, scales = poisoned(3, 32, dtype=torch.uint8), torch.full((3,), float("nan"), device="cuda")
    K.swiglu(zeros, out, stream=stream(), out_scales=scales)
    assert bool((fp8_values(out, scales) == 0).all())
    normed = poisoned(3, 64, dtype=torch.uint8)
    K.residual_norm(
        zeros, zeros.float(), None, None, random_bf16(64), 1e-5, stream=stream(), normed_fp8=normed,
        normed_scales=scales,
    )  # fmt: skip
    assert bool((fp8_values(normed, scales) == 0).all())


@pytest.mark.parametrize("rows", AWKWARD)
@pytest.mark.parametrize("width", [1, 320, 1001])
def test_capped_logits(rows: int, width: int) -> None:
    x = poisoned(rows, width, dtype=torch.float32)
    x.normal_().mul_(40.0)
    wanted = 30.0 * torch.tanh(x.double() / 30.0)
    K.soft_cap(x, 30.0, stream=stream())
    assert torch.allclose(x.double(), wanted, rtol=1e-5, atol=1e-5)
    assert_untouched(x)


@pytest.mark.parametrize("count", AWKWARD)
def test_gathered_rows_and_zeros_for_negative_ones(count: int) -> None:
    x = random_bf16(99, 584)
    rows = torch.randint(-1, 99, (count,), device="cuda", dtype=torch.int32)
    out = poisoned(count, 584, dtype=torch.bfloat16)
    K.gather_rows(x, rows, out, stream=stream())
    assert torch.equal(out, torch.where(rows[:, None] < 0, 0, x[rows.long()]))
    assert_untouched(out)
