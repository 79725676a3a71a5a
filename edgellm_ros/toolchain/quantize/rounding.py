"""How int4 weights are rounded: by what the error does to a layer's output on the calibration text, not to the weights.

Scales are searched below the one that holds a group's largest weight. Then input features are rounded one after the
other, each correcting those that follow (GPTQ, Frantar et al. 2022). ModelOpt's own GPTQ quantises a whole matrix for
each column, which takes a CPU hours, and starts from the largest weights' scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOWEST, HIGHEST = -8, 7
_SHRINK = tuple(0.5 + 0.05 * step for step in range(12))  # scales that are tried, of the one for the largest weight
_DAMPING = 0.05  # of the mean diagonal: what a few thousand tokens say of correlations is not trusted further
_BLOCK = 64  # features whose corrections to the rest are added up
_CHUNK = 1 << 16  # weights whose scales are searched together on a CPU: they stay in its cache


@dataclass(frozen=True)
class Corrections:
    """How the error of one input feature is made up for by those after it."""

    order: torch.Tensor  # (in,) features as they are rounded: what matters most first, which the rest corrects
    upper: torch.Tensor  # (in, in) Cholesky factor of the inverse of XᵀX, in that order

    @classmethod
    def of(cls, product: torch.Tensor) -> Corrections:
        """For XᵀX (in, in)."""
        order = product.diagonal().argsort(descending=True)
        product = product[order][:, order] / product.diagonal().mean().clamp(min=1e-30)
        product.diagonal().add_(_DAMPING)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(product))
        return cls(order, torch.linalg.cholesky(inverse, upper=True))


def choose_scales(weight: torch.Tensor, product: torch.Tensor, group_size: int) -> torch.Tensor:
    """Scales (out, groups) of a weight (out, in) that leave the least error in its output; product: XᵀX (in, in).

    The error counts within a group only.
    """
    num_in = weight.shape[1]
    inner = torch.stack([product[at : at + group_size, at : at + group_size] for at in range(0, num_in, group_size)])
    rows = len(weight) if weight.is_cuda else max(1, _CHUNK // num_in)
    return torch.cat([_chosen(part, inner) for part in weight.split(rows)])


def _chosen(weight: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """`inner` (groups, size, size) has the blocks of XᵀX."""
    num_groups, size = inner.shape[:2]
    groups = weight.reshape(-1, num_groups, size).transpose(0, 1).contiguous()  # (groups, out, size)
    widest = (groups.abs().amax(-1, keepdim=True) / HIGHEST).clamp(min=1e-8)
    best, least = widest.clone(), torch.full_like(widest, float("inf"))
    error, seen = torch.empty_like(groups), torch.empty_like(groups)
    for shrink in _SHRINK:
        scale = widest * shrink
        torch.div(groups, scale, out=error)
        error.round_().clamp_(LOWEST, HIGHEST).mul_(scale).sub_(groups)
        loss = torch.bmm(error, inner, out=seen).mul_(error).sum(-1, keepdim=True)
        best = torch.where(loss < least, scale, best)
        least = torch.minimum(loss, least)
    return best.squeeze(-1).T.contiguous()


def round_columns(weight: torch.Tensor, scale: torch.Tensor, corrections: Corrections) -> torch.Tensor:
    """The multiples of `scale` (out, groups) for a weight (out, in) whose errors cancel best in its output."""
    group_size = weight.shape[1] // scale.shape[1]
    return round_to_steps(weight, scale.T.repeat_interleave(group_size, 0), corrections)


def round_to_steps(weight: torch.Tensor, steps: torch.Tensor, corrections: Corrections) -> torch.Tensor:
    """The same for a step of each weight; steps: (in, out)."""
    num_out, num_in = weight.shape
    order, upper = corrections.order, corrections.upper
    work, steps = weight.T[order], steps[order]  # (in, out): a feature's weights lie side by side
    rounded, errors = torch.empty_like(work), work.new_empty(_BLOCK, num_out)
    weights = (1 / upper.diagonal()).tolist()
    for start in range(0, num_in, _BLOCK):
        stop = min(start + _BLOCK, num_in)
        for at in range(start, stop):
            torch.div(work[at], steps[at], out=rounded[at]).round_().clamp_(LOWEST, HIGHEST).mul_(steps[at])
            error = torch.sub(work[at], rounded[at], out=errors[at - start]).mul_(weights[at])
            if at + 1 < stop:
                work[at + 1 : stop].addr_(upper[at, at + 1 : stop], error, alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    result = torch.empty_like(rounded)
    result[order] = rounded
    return result.T.contiguous()
