"""RMSNorm, and the residual addition with the norm of the sum, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_case import (
    AWKWARD,
    K,
    assert_fp8,
    assert_untouched,
    fp8_values,
    needs_gpu,
    poisoned,
    product_scales,
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


def test_rows_of_zeros_have_a_scale_and_stay_zeros() -> None:
    zeros, scales = torch.zeros((3, 64), device="cuda", dtype=torch.bfloat16), torch.full((3,), float("nan"), device="cuda")
    normed = poisoned(3, 64, dtype=torch.uint8)
    K.residual_norm(
        zeros, zeros.float(), None, None, random_bf16(64), 1e-5, stream=stream(), normed_fp8=normed,
        normed_scales=scales,
    )  # fmt: skip
    assert bool((fp8_values(normed, scales) == 0).all())
