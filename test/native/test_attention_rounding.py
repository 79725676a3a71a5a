"""Which rounding of queries the GPU tests of attention have to expect: the kernels' number formats in torch, on a CPU.

A tree test once expected bf16 queries of a kernel that has fp16 ones: the outputs differ by more than its tolerance.
Another failed once in many runs, by one query that fp32 rounds up and fp64 down.
"""

from __future__ import annotations

from typing import Any

import pytest
from plugin_case import BF16, FP8, HALF, query_type
from rounding_ties import SLACK, attended_alike

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


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_query_in_the_middle_of_two_numbers_may_be_rounded_either_way_and_no_other(kind: Any) -> None:
    step = 2.0 ** (2 - {torch.bfloat16: 7, torch.float16: 10}[kind])  # of numbers from 4 to 8
    # Two positions of like scores, apart in the first place's key only; values apart by 8.
    keys, values = torch.zeros((2, 64)).double(), torch.zeros((2, 64)).double()
    keys[1, 0], values[1] = 8.0, 8.0

    def compared(first: float, used: float) -> bool:
        turned, kernels = torch.zeros((2, 64)).double(), torch.zeros((2, 64)).double()
        turned[1, 0], kernels[1, 0] = first, used
        turned[:, 1] = kernels[:, 1] = 7.0  # the largest, which keys do not see
        return attended_alike(plain(kernels), turned, kind, plain, rtol=0.0, atol=step / 4)

    def plain(q: Any) -> Any:
        # Less what the score of the number below is, so that the outputs lie about the middle, where they move most.
        q = q.clone()
        q[1, 0] -= 4.0
        return torch.softmax(q @ keys.T * 64**-0.5, dim=1) @ values

    middle, slack = 4.0 + step / 2, 7.0 * SLACK
    for first in (middle, middle + slack / 2, middle - slack / 2):
        assert compared(first, 4.0) and compared(first, 4.0 + step)
        assert not compared(first, 4.0 + 2 * step) and not compared(first, 4.0 - step)
    assert compared(middle + 2 * slack, 4.0 + step) and not compared(middle + 2 * slack, 4.0)
    assert compared(middle - 2 * slack, 4.0) and not compared(middle - 2 * slack, 4.0 + step)


def test_of_many_ties_those_that_move_most_are_tried() -> None:
    turned = torch.full((1, 64), 2.0**-6).double()
    turned[0, :20] += 2.0**-14  # twenty small ones in the middle
    turned[0, 40] = 4.0 + 2.0**-6
    kernels = turned.bfloat16().double()
    kernels[0, 40] = 4.0 + 2.0**-5
    got = kernels.clone()

    def plain(q: Any) -> Any:
        return q

    assert attended_alike(got, turned, torch.bfloat16, plain, rtol=0.0, atol=2.0**-7)
    got[0, 41] += 2.0**-5
    assert not attended_alike(got, turned, torch.bfloat16, plain, rtol=0.0, atol=2.0**-7)


def test_queries_that_stay_fp32_are_compared_as_they_are() -> None:
    q, moved = torch.full((1, 64), 1.0).double(), torch.full((1, 64), 1.0 + 2.0**-9).double()
    assert attended_alike(q, q, None, lambda x: x, 0.0, 2.0**-10)
    assert not attended_alike(moved, q, None, lambda x: x, 0.0, 2.0**-10)


def test_heads_with_ties_agree_with_fp64_whichever_way_these_are_rounded() -> None:
    """A tree's node that sees five keys; the three largest queries of each head lie in the middle of two bf16 numbers."""
    generator = torch.Generator().manual_seed(5)
    heads, positions, dim = 500, 5, 80
    q, keys, values = (2 * torch.randn((heads, n, dim), generator=generator).double() for n in (1, positions, positions))
    turned = q[:, 0].bfloat16().double()
    places = turned.abs().topk(3, dim=1).indices
    middles = turned.gather(1, places)
    middles += torch.sign(middles) * 2.0 ** (torch.floor(torch.log2(middles.abs())) - 8)
    turned.scatter_(1, places, middles)

    def attend(x: Any, weights_in: Any = None) -> Any:
        scores = torch.einsum("hd,hpd->hp", x, keys) * dim**-0.5
        weights = torch.exp(scores - scores.amax(1, keepdim=True))
        rounded = weights if weights_in is None else weights.to(weights_in).double()
        return torch.einsum("hp,hpd->hd", rounded, values) / weights.sum(1, keepdim=True)

    way = torch.randint(0, 2, places.shape, generator=generator) * 2 - 1
    kernels = turned.scatter(1, places, middles * (1 + way * 2.0**-12)).bfloat16().double()
    got = attend(kernels, torch.bfloat16).half()
    assert attended_alike(got, turned, torch.bfloat16, attend, rtol=2**-6, atol=8e-3)
    assert int((~torch.isclose(got.double(), attend(turned.bfloat16().double()), rtol=2**-6, atol=8e-3)).any(1).sum()) > 10
    kernels[:, 0] *= 1.25  # what no rounding makes of it
    got = attend(kernels, torch.bfloat16).half()
    assert not attended_alike(got, turned, torch.bfloat16, attend, rtol=2**-6, atol=8e-3)
