"""Capped logits against fp64."""

from __future__ import annotations

import pytest
from kernel_case import AWKWARD, K, assert_untouched, needs_gpu, poisoned, stream, torch

pytestmark = needs_gpu


@pytest.mark.parametrize("rows", AWKWARD)
@pytest.mark.parametrize("width", [1, 320, 1001])
def test_capped_logits(rows: int, width: int) -> None:
    x = poisoned(rows, width, dtype=torch.float32)
    x.normal_().mul_(40.0)
    wanted = 30.0 * torch.tanh(x.double() / 30.0)
    K.soft_cap(x, 30.0, stream=stream())
    assert torch.allclose(x.double(), wanted, rtol=1e-5, atol=1e-5)
    assert_untouched(x)
