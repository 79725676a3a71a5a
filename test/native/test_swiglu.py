"""A prompt's SwiGLU and GeGLU against fp64."""

from __future__ import annotations

import pytest
from kernel_case import (
    AWKWARD,
    NATIVE,
    K,
    activate,
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


@pytest.mark.parametrize("name", ["bias", "column_scales"])
def test_features_that_are_not_aligned_are_refused(name: str) -> None:
    gate_up, out = random_bf16(3, 16), poisoned(3, 8, dtype=torch.bfloat16)
    features = torch.randn(17, device="cuda")[1:]
    more = {"row_scales": torch.ones(3, device="cuda")} if name == "column_scales" else {}
    with pytest.raises(ValueError, match=f"{name} must be 16-byte aligned"):
        K.swiglu(gate_up, out, stream=stream(), **{name: features}, **more)
