"""What a TensorRT engine reads of a step, against loops in Python."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from kernel_case import K, assert_untouched, needs_gpu, poisoned, stream, torch

pytestmark = needs_gpu
HIDDEN = [1, 19, 577, 4096]
DTYPES = ["float16", "bfloat16"]


def ints(values: Iterable[int], dtype: str = "int32") -> Any:
    return torch.tensor(list(values), device="cuda", dtype=getattr(torch, dtype))


def outputs(rows: int, hidden: int, sequences: int, num_logits: int, dtype: str, trees: bool) -> tuple[Any, ...]:
    """Poisoned (embeds, positions, write_indices, logit_indices[, tree_masks])."""
    counts = [rows, sequences, num_logits, *([rows] if trees else [])]
    longs = [poisoned(count, dtype=torch.int64) for count in counts]
    return poisoned(rows, hidden, dtype=getattr(torch, dtype)), *longs


def word(seen: Iterable[int]) -> int:
    """The tokens seen as the bits of a signed number of 64 bits."""
    bits = sum(1 << i for i in seen)
    return bits - (1 << 64) if bits >> 63 else bits


def path(parents: Sequence[int], node: int) -> list[int]:
    """A node and its ancestors."""
    return [node, *(path(parents, parents[node]) if parents[node] >= 0 else [])]


def random_tree(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [-1, *(draw.randrange(-1, i) for i in range(1, count))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("trees", [False, True])
def test_a_rows_place_is_its_slots_and_idle_ones_write_where_nobody_reads(
    dtype: str, hidden: int, trees: bool
) -> None:
    slots, positions, members = [6, 3, 9, 4, 7], [17, 0, 5, 4098, 1], [0, 1, 3]  # of the sequences at 2 and 4: others
    first_slot, num_rows, idle = 3, 5, 999
    residual = torch.randn((len(slots), hidden), device="cuda")
    out = outputs(num_rows, hidden, num_rows, len(members), dtype, trees)
    K.engine_rows(
        residual, ints(positions), ints(slots), sum(1 << i for i in members), first_slot, num_rows, idle, out,
        stream=stream(),
    )  # fmt: skip
    embeds, places, writes, logits = out[:4]
    at = {slots[i] - first_slot: i for i in members}
    assert places.tolist() == [positions[at[row]] if row in at else 0 for row in range(num_rows)]
    assert writes.tolist() == [positions[at[row]] if row in at else idle for row in range(num_rows)]
    assert logits.tolist() == [slots[i] - first_slot for i in members]
    for row in range(num_rows):
        wanted = residual[at[row]].to(embeds.dtype) if row in at else torch.zeros_like(embeds[row])
        assert torch.equal(embeds[row], wanted)
    if trees:
        assert out[4].tolist() == [1] * num_rows
    for array in out:
        assert_untouched(array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize(("tokens", "num_logits"), [(1, 1), (19, 19), (99, 3), (989, 1)])
def test_a_chunk_is_in_order_and_its_last_rows_have_logits(
    dtype: str, hidden: int, tokens: int, num_logits: int
) -> None:
    residual = torch.randn((tokens, hidden), device="cuda")
    out = outputs(tokens, hidden, 1, num_logits, dtype, True)
    K.engine_chunk(residual, 33, num_logits, out, stream=stream())
    embeds, places, writes, logits, masks = out
    assert places.tolist() == list(range(33, 33 + tokens)) and writes.tolist() == [33]
    assert logits.tolist() == list(range(tokens - num_logits, tokens))
    assert torch.equal(embeds, residual.to(embeds.dtype))
    assert masks.tolist()[:64] == [word(range(token + 1)) for token in range(min(tokens, 64))]
    for array in out:
        assert_untouched(array)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("count", [1, 2, 19, 63, 64])
def test_a_trees_nodes_are_at_their_depth_and_see_their_path(count: int, on_device: bool) -> None:
    parents = random_tree(count, count)
    paths = [path(parents, node) for node in range(count)]
    residual = torch.randn((count, 96), device="cuda")
    out = outputs(count, 96, 1, count, "float16", True)
    K.engine_chunk(
        residual, 7 if on_device else 500, count, out, ints(len(seen) - 1 for seen in paths),
        ints(map(word, paths), "int64"), ints([500]) if on_device else None, stream=stream(),
    )  # fmt: skip
    assert out[1].tolist() == [500 + len(seen) - 1 for seen in paths]
    assert out[2].tolist() == [500] and out[3].tolist() == list(range(count))
    assert out[4].tolist() == [word(seen) for seen in paths]
    for array in out:
        assert_untouched(array)


def visible(mask: Any) -> list[set[int]]:
    """The places that each token sees; everything else must be out of softmax's reach, and finite."""
    values = mask.float()
    assert bool(((values == 0) | (values < -6e4)).all()) and bool(torch.isfinite(values).all())
    return [set(row.nonzero().flatten().tolist()) for row in values == 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 19, 300])
@pytest.mark.parametrize(("tokens", "first", "capacity"), [(1, 0, 1), (1, 98, 99), (19, 200, 989), (99, 0, 99)])
def test_a_token_sees_what_lies_before_it_inside_its_window(
    dtype: str, window: int, tokens: int, first: int, capacity: int
) -> None:
    positions = list(range(first, first + tokens))
    mask = poisoned(tokens, capacity, dtype=getattr(torch, dtype))
    K.engine_mask(ints(positions, "int64"), mask, window, stream=stream())
    wanted = [set(range(max(0, at - window + 1) if window else 0, at + 1)) for at in positions]
    assert visible(mask) == wanted
    assert_untouched(mask)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("window", [0, 2, 40])
@pytest.mark.parametrize("count", [1, 19, 64])
def test_a_node_sees_the_prefix_and_its_path(window: int, count: int, on_device: bool) -> None:
    prefix, parents = 33, random_tree(count, 7 * count)
    paths = [path(parents, node) for node in range(count)]
    positions = [prefix + len(seen) - 1 for seen in paths]
    mask = poisoned(count, 200, dtype=torch.float16)
    K.engine_mask(
        ints(positions, "int64"), mask, window, ints(map(word, paths), "int64"), 7 if on_device else prefix,
        ints([prefix]) if on_device else None, stream=stream(),
    )  # fmt: skip
    for node, seen in enumerate(visible(mask)):
        first = positions[node] - window + 1 if window else 0
        wanted = {place for place in range(prefix) if place >= first}
        wanted |= {prefix + other for other in paths[node] if positions[other] >= first}
        assert seen == wanted, node
    assert_untouched(mask)
