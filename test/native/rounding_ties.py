"""Attention of queries that a kernel turned in fp32 and rounded, compared with fp64.

An element that lies between two numbers of 16 bits, to within fp32's error, may rightly be rounded either way. One of bf16
moves a score of several units by a hundredth, and outputs by up to 0.03: more than every other rounding together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SLACK = 2.0**-20  # fp32's error of a turned query, of its largest element: the norm's sum and root, products, a difference
MOST_TIES = 7  # tried of one head, those that move it most: bf16 has one in two heads of 128, fp16 nine in one of 256


def attended_alike(
    got: Any, turned: Any, rounded_to: Any, attend: Callable[[Any], Any], rtol: float, atol: float
) -> bool:
    """Whether `got` (heads, head_dim) is attend() of the queries `turned` (heads, head_dim) fp64, rounded to that dtype.

    None: they are not rounded. `attend` maps (heads, head_dim) fp64 to the same, each head for itself."""
    import torch

    def right(queries: Any) -> Any:
        return torch.isclose(got.double(), attend(queries), rtol=rtol, atol=atol).all(1)

    if rounded_to is None:
        return bool(right(turned).all())
    queries = turned.to(rounded_to).double()
    other = (2 * turned - queries).to(rounded_to).double()  # the next number, where an element lies in the middle
    off = (turned - (queries + other) / 2).abs()
    tied = (other != queries) & (off <= SLACK * turned.abs().amax(1, keepdim=True))
    for head in torch.nonzero(~right(queries)).flatten().tolist():
        ties = torch.nonzero(tied[head]).flatten().tolist()
        ties = sorted(ties, key=lambda i: -float((other - queries)[head, i].abs()))[:MOST_TIES]
        for choice in range(1, 1 << len(ties)):
            turns = [place for n, place in enumerate(ties) if choice >> n & 1]
            tried = queries.clone()
            tried[head, turns] = other[head, turns]
            if bool(right(tried)[head]):
                break
        else:
            return False
    return True
