"""Which rounding of queries the GPU tests of attention have to expect: the kernels' number formats in torch, on a CPU.

A tree test once expected bf16 queries of a kernel that has fp16 ones: the outputs differ by more than its tolerance.
"""

from __future__ import annotations

from typing import Any

import pytest
from plugin_case import BF16, FP8, HALF, query_type

torch = pytest.importorskip("torch")
TYPES = {HALF: torch.float16, BF16: torch.bfloat16, FP8: torch.float8_e4m3fn}


def attend(q: Any, keys: Any, values: Any, weights_in: Any = None) -> Any:
    """(heads, head_dim) over (positions, head_dim), weights rounded to a product's operand or not at all."""
    weights = torch.exp(q @ keys.T * q.shape[1] ** -0.5)
    weights = weights / weights.amax(1, keepdim=True)
    rounded = weights if weights_in is None else weights.to(weights_in).double()
    return rounded @ values / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("positions", [2, 19, 140])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("cache", [HALF, BF16, FP8])
def test_a_trees_queries_have_the_type_of_its_products(cache: int, head_dim: int, positions: int) -> None:
    """native/kernels/attention_tree_rows.cuh, TreeOperand: fp16 for an fp16 cache, bf16 for the others."""
    operand = {HALF: torch.float16, BF16: torch.bfloat16, FP8: torch.bfloat16}[cache]
    wanted = query_type(cache, 2, tree=True)
    assert wanted is not None
    generator = torch.Generator().manual_seed(positions)
    missed = 0
    for _ in range(30):
        q, keys, values = (2 * torch.randn((n, head_dim), generator=generator).double() for n in (16, positions, positions))
        keys, values = (x.to(TYPES[cache]).double() for x in (keys, values))
        got = attend(q.to(operand).double(), keys, values, operand).to(torch.bfloat16).double()
        right, wrong = (attend(q.to(TYPES[t]).double(), keys, values) for t in (wanted, HALF + BF16 - wanted))
        assert torch.allclose(got, right, rtol=2**-6, atol=8e-3)
        missed += not torch.allclose(got, wrong, rtol=2**-6, atol=8e-3)
    assert missed >= 5, "the tolerance tells the two apart"


def test_prompts_and_single_tokens_are_rounded_apart_from_trees() -> None:
    for cache in (HALF, BF16, FP8):
        assert query_type(cache, 1, tree=True) is None
        assert query_type(cache, 65, tree=True) == query_type(cache, 2, tree=False) == BF16
