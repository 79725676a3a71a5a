"""An accepted path's keys and values, moved together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from kernel_case import K, needs_gpu, stream, torch

pytestmark = needs_gpu


def ints(values: Iterable[int]) -> Any:
    return torch.tensor(list(values), device="cuda", dtype=torch.int32)


@pytest.mark.parametrize("dtype", ["bfloat16", "uint8"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_an_accepted_path_moves_together_in_every_layer(dtype: str, head_dim: int) -> None:
    layers, slots, kv_heads, capacity = 3, 4, 3, 99
    cache = torch.randint(0, 255, (layers, slots, 2, kv_heads, capacity, head_dim), device="cuda").to(
        getattr(torch, dtype)
    )
    before = cache.clone()
    paths = [[0, 3, 7, 9, 12, 20, 21, 22, 40, 63], [0, 1, 2], [5], [0, 2]]
    positions = [10, 50, 0, -1]
    padded = torch.full((4, 10), 1000, device="cuda", dtype=torch.int32)
    for s, path in enumerate(paths):
        padded[s, : len(path)] = ints(path)
    order = [2, 0, 3, 1]
    K.kv_compact(cache, ints(order), ints(positions), padded, ints(map(len, paths)), stream=stream())
    for slot, position, path in zip(order, positions, paths, strict=True):
        for i, node in enumerate(path) if position >= 0 else ():
            assert torch.equal(cache[:, slot, :, :, position + i], before[:, slot, :, :, position + node])
        kept = torch.ones(capacity, dtype=torch.bool)
        if position >= 0:
            kept[position : position + len(path)] = False
        assert torch.equal(cache[:, slot][..., kept, :], before[:, slot][..., kept, :])
