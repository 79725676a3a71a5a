"""By what input features are multiplied before int4 rounding (AWQ, Lin et al. 2023): larger where more is read.

As in the paper, a factor is a power of what a feature reads, one for all layers that share an input. Powers are
compared by the error that is left after the weights have been rounded as rounding.py does it; the paper, and ModelOpt,
round to nearest there, and so choose factors that do harm where rounding already makes up for its errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgellm_ros.toolchain.quantize.rounding import Corrections, choose_scales, round_to_steps

_POWERS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75)  # 0 leaves the weights as they are
_ROWS = 128  # output features that decide; each is rounded by itself, so some tell as much as all


def choose_factor(
    weights: Sequence[torch.Tensor], product: torch.Tensor, corrections: Corrections, group_size: int,
    heads: tuple[int, int, int] | None = None,
) -> torch.Tensor:  # fmt: skip
    """The factor (in,) by which weights (out, in) that share an input are multiplied, and what they read divided.

    product: XᵀX (in, in). heads: (key-value heads, query heads that share each, features) where the input is what
    attention gives: features of one value get one factor, for it goes into the layer before.
    """
    read = product.diagonal().clamp(min=1e-12).sqrt()
    if heads is not None:
        read = read.view(heads).square().mean(1, keepdim=True).sqrt().expand(heads).reshape(-1)
    rows = torch.cat(list(weights)).float()
    rows = rows[:: -(-len(rows) // _ROWS)]
    factors, steps = [], []
    for power in _POWERS:
        factor = read**power
        factor = factor / (factor.max() * factor.min()).sqrt()
        scale = choose_scales(rows * factor, product / torch.outer(factor, factor), group_size)
        factors.append(factor)
        steps.append(scale.T.repeat_interleave(group_size, 0) / factor[:, None])  # what a step is before the factor
    # A factor changes nothing but the steps, so that all powers are rounded at once.
    error = rows.repeat(len(_POWERS), 1)
    error = error - round_to_steps(error, torch.cat(steps, 1), corrections)
    losses = ((error @ product) * error).sum(1).reshape(len(_POWERS), -1).sum(1)
    return factors[int(losses.argmin())]
