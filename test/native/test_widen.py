"""bf16 in fp32, with a bias, against torch: every number exactly."""

from __future__ import annotations

import pytest
from kernel_case import AWKWARD, K, assert_untouched, needs_gpu, poisoned, random_bf16, stream, torch

pytestmark = needs_gpu


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tokens", AWKWARD)
@pytest.mark.parametrize("width", [8, 2056, 6144])
def test_each_number_and_its_bias(width: int, tokens: int, has_bias: bool) -> None:
    y, out = random_bf16(tokens, width), poisoned(tokens, width, dtype=torch.float32)
    bias = torch.randn(width, device="cuda") if has_bias else None
    K.widen(y, out, bias, stream=stream())
    assert torch.equal(out, y.float() + bias if has_bias else y.float())
    assert_untouched(out)


def test_a_width_that_is_no_multiple_of_8_is_refused() -> None:
    y, out = random_bf16(2, 12), torch.empty(2, 12, device="cuda")
    with pytest.raises(ValueError, match="no multiple of 8"):
        K.widen(y, out)
