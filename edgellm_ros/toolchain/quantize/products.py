"""What linear layers read of the calibration text, XᵀX held once for those that share an input, and work on each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from edgellm_ros.memory import physical_cores

_PRODUCT_BYTES = 1 << 30  # what is held of XᵀX at once; more layers take another reading of the text
_COPIES = 6  # of a product that rounding holds for a moment
_Result = TypeVar("_Result")


@dataclass
class SharedInput:
    """Layers that read the same tensor, as q, k and v do."""

    layers: list[Any]
    product: torch.Tensor  # (in, in) fp32, XᵀX with every token scaled to the same size
    largest: torch.Tensor  # (in,) fp32, |x| of each feature, tokens as they are


def read_inputs(layers: Iterable[Any], forward: Callable[[], None]) -> list[SharedInput]:
    """XᵀX of what each of `layers` reads while `forward` lets the model read the text.

    Tokens are scaled to the same size: else the few with huge activations, which the next norm divides away again,
    would decide alone.
    """
    found: list[SharedInput] = []
    places: dict[Any, SharedInput] = {}
    last: list[Any] = [None, None]  # the tensor that was read last, and who shares it

    def add(layer: Any, inputs: tuple[Any, ...]) -> None:
        if last[0] is inputs[0]:
            if layer not in places:
                places[layer] = last[1]
                last[1].layers.append(layer)
            return
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        largest = rows.abs().amax(0)
        rows = rows * rows.square().mean(-1, keepdim=True).clamp(min=1e-30).rsqrt()
        if layer in places:
            places[layer].product.addmm_(rows.T, rows)
            torch.maximum(places[layer].largest, largest, out=places[layer].largest)
        else:
            places[layer] = SharedInput([layer], rows.T @ rows, largest)
            found.append(places[layer])
        last[:] = inputs[0], places[layer]

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def parts_of(layers: Iterable[Any]) -> Iterator[list[Any]]:
    """The layers in order, in lists whose products fit _PRODUCT_BYTES, even if none shared its input."""
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


def side_by_side(work: Callable[[SharedInput], _Result], inputs: Sequence[SharedInput]) -> Iterator[_Result]:
    """`work` on every input, in their order: on a CPU one a core, as far as 2 * _PRODUCT_BYTES of copies allow.

    Each is thousands of small operations, which more threads do not make faster; on busy cores, threads that wait for
    each other take ten times as long.
    """
    if not inputs or inputs[0].product.is_cuda:
        yield from map(work, inputs)
        return
    largest = max(shared.product.nbytes for shared in inputs)
    workers = max(1, min(physical_cores(), len(inputs), 2 * _PRODUCT_BYTES // (_COPIES * largest)))

    def alone(shared: SharedInput) -> _Result:
        with torch.no_grad():  # which is of a thread
            return work(shared)

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # new threads take it over
    try:
        with ThreadPoolExecutor(workers, "edgellm-rounding", torch.set_num_threads, (1,)) as pool:
            yield from list(pool.map(alone, inputs))
    finally:
        torch.set_num_threads(before)
