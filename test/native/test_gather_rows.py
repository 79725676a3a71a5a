"""Rows that do not lie together."""

from __future__ import annotations

import pytest
from kernel_case import AWKWARD, K, assert_untouched, needs_gpu, poisoned, random_bf16, stream, torch

pytestmark = needs_gpu


@pytest.mark.parametrize("count", AWKWARD)
def test_gathered_rows_and_zeros_for_negative_ones(count: int) -> None:
    x = random_bf16(99, 584)
    rows = torch.randint(-1, 99, (count,), device="cuda", dtype=torch.int32)
    out = poisoned(count, 584, dtype=torch.bfloat16)
    K.gather_rows(x, rows, out, stream=stream())
    assert torch.equal(out, torch.where(rows[:, None] < 0, 0, x[rows.long()]))
    assert_untouched(out)
