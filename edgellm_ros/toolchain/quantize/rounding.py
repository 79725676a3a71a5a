"""How int4 weights are rounded: by what the error does to a layer's output on the calibration text, not to the weights.

Scales are searched below the one that holds a group's largest weight. Then input features are rounded one after the
other, each correcting those that follow (GPTQ, Frantar et al. 2022). ModelOpt's own GPTQ quantises a whole matrix for
each column, which takes a CPU hours, and starts from the largest weights' scales.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

LOWEST, HIGHEST = -8, 7
_SHRINK = tuple(0.5 + 0.05 * step for step in range(12))  # scales that are tried, of the one for the largest weight
_DAMPING = 0.01  # of the mean diagonal, as in the paper
_BLOCK = 128  # columns whose corrections to the rest are added up
_PRODUCT_BYTES = 1 << 30  # what is held of XᵀX at once; more layers take another reading of the text


def round_layers(
    factors: Mapping[Any, torch.Tensor | None], group_size: int, forward: Callable[[], None]
) -> Iterator[tuple[Any, torch.Tensor]]:
    """Round the weights [out, in] of linear layers in place; yields each layer and its scales (out, groups) in fp32.

    factors: the layers, and what each multiplies its input by (in,). forward: lets the model read the calibration text
    with weights as they are; called as often as memory demands.
    """
    for part in _parts(list(factors)):
        with _products_of_inputs(part) as products:
            forward()
        for layer in part:
            product, factor = products.pop(layer), factors[layer]
            if factor is not None:
                product = product * torch.outer(factor.float(), factor.float())
            weight = layer.weight.detach().float()
            scale = choose_scales(weight, product, group_size)
            layer.weight.data = round_columns(weight, scale, product).to(layer.weight.dtype)
            yield layer, scale


def choose_scales(weight: torch.Tensor, product: torch.Tensor, group_size: int) -> torch.Tensor:
    """Scales (out, groups) of a weight (out, in) that leave the least error in its output; product: XᵀX (in, in).

    The error counts within a group only.
    """
    num_out, num_in = weight.shape
    groups = weight.reshape(num_out, -1, group_size).transpose(0, 1)  # (groups, out, size)
    inner = torch.stack([product[at : at + group_size, at : at + group_size] for at in range(0, num_in, group_size)])
    widest = (groups.abs().amax(-1, keepdim=True) / HIGHEST).clamp(min=1e-8)
    best, least = widest, torch.full_like(widest, float("inf"))
    for shrink in _SHRINK:
        scale = widest * shrink
        error = groups - (groups / scale).round_().clamp_(LOWEST, HIGHEST) * scale
        loss = ((error @ inner) * error).sum(-1, keepdim=True)
        best = torch.where(loss < least, scale, best)
        least = torch.minimum(loss, least)
    return best.squeeze(-1).T.contiguous()


def round_columns(weight: torch.Tensor, scale: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    """The multiples of `scale` (out, groups) for a weight (out, in) whose errors cancel best; product: XᵀX (in, in)."""
    num_in = weight.shape[1]
    product = product / product.diagonal().mean().clamp(min=1e-30)
    order = product.diagonal().argsort(descending=True)  # what matters most comes first and is corrected by the rest
    product = product[order][:, order]
    product.diagonal().add_(_DAMPING)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(product))
    upper = torch.linalg.cholesky(inverse, upper=True)
    work = weight[:, order]
    wide = scale.repeat_interleave(num_in // scale.shape[1], 1)[:, order]
    rounded = torch.empty_like(work)
    for start in range(0, num_in, _BLOCK):
        stop = min(start + _BLOCK, num_in)
        block, errors = work[:, start:stop], torch.empty_like(work[:, start:stop])
        for column in range(stop - start):
            at = start + column
            value, step = block[:, column], wide[:, at]
            rounded[:, at] = (value / step).round().clamp(LOWEST, HIGHEST) * step
            errors[:, column] = (value - rounded[:, at]) / upper[at, at]
            block[:, column + 1 :].addr_(errors[:, column], upper[at, at + 1 : stop], alpha=-1)
        work[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    result = torch.empty_like(rounded)
    result[:, order] = rounded
    return result


@contextlib.contextmanager
def _products_of_inputs(layers: Sequence[Any]) -> Iterator[dict[Any, torch.Tensor]]:
    """XᵀX (in, in) in fp32 of what each layer reads inside the context, every token scaled to the same size.

    Else the few tokens with huge activations, which the next norm divides away again, would decide alone.
    """
    products: dict[Any, torch.Tensor] = {}
    last: list[Any] = [None, None]  # q, k and v read one tensor; so do gate and up

    def add(layer: Any, inputs: tuple[Any, ...]) -> None:
        if last[0] is not inputs[0]:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            rows = rows * rows.square().mean(-1, keepdim=True).clamp(min=1e-30).rsqrt()
            last[:] = inputs[0], rows.T @ rows
        products[layer] = products[layer] + last[1] if layer in products else last[1]

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    try:
        yield products
    finally:
        for hook in hooks:
            hook.remove()


def _parts(layers: Sequence[Any]) -> Iterator[list[Any]]:
    """The layers in order, in lists whose products fit _PRODUCT_BYTES."""
    part: list[Any] = []
    size = 0
    for layer in layers:
        needed = 4 * layer.in_features**2
        if part and size + needed > _PRODUCT_BYTES:
            yield part
            part, size = [], 0
        part.append(layer)
        size += needed
    if part:
        yield part
