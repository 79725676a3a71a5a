"""A layer's input in another order, times a factor."""

from __future__ import annotations

import pytest
from kernel_case import AWKWARD, K, assert_untouched, needs_gpu, poisoned, random_bf16, stream, torch

pytestmark = needs_gpu


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
