"""Prefill's small kernels against fp64."""

from __future__ import annotations

import pytest
from kernel_case import AWKWARD, K, assert_untouched, needs_gpu, poisoned, random_bf16, stream, torch

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
@pytest.mark.parametrize("hidden", [18, 576, 4096])
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


@pytest.mark.parametrize("tokens", AWKWARD)
@pytest.mark.parametrize("with_bias", [False, True])
def test_swiglu(tokens: int, with_bias: bool) -> None:
    gate_up = random_bf16(tokens, 2 * 200, scale=3.0)
    bias = torch.randn(400, device="cuda") if with_bias else None
    out = poisoned(tokens, 200, dtype=torch.bfloat16)
    K.swiglu(gate_up, out, bias, stream=stream())
    y = gate_up.double() + (bias.double() if with_bias else 0)
    wanted = torch.nn.functional.silu(y[:, :200]) * y[:, 200:]
    assert torch.allclose(out.double(), wanted, rtol=2**-7, atol=1e-6)
    assert_untouched(out)


@pytest.mark.parametrize("count", AWKWARD)
def test_gathered_rows_and_zeros_for_negative_ones(count: int) -> None:
    x = random_bf16(99, 584)
    rows = torch.randint(-1, 99, (count,), device="cuda", dtype=torch.int32)
    out = poisoned(count, 584, dtype=torch.bfloat16)
    K.gather_rows(x, rows, out, stream=stream())
    assert torch.equal(out, torch.where(rows[:, None] < 0, 0, x[rows.long()]))
    assert_untouched(out)
