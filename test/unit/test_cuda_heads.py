"""What the cuda executor does to heads for its kernels leaves scores as the model has them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgellm_ros.benchmark.random_bundle import SHAPES
from edgellm_ros.executors.cuda_heads import (
    head_order,
    layer_rope_stems,
    no_rope_tables,
    order_adapter,
    order_stacked,
    whole_table,
)
from edgellm_ros.executors.lora import LoraAdapter, LoraTensors

RNG = np.random.default_rng(4)


def model(head_dim: int, rotary_dim: int) -> object:
    return replace(SHAPES["llama-1b"], num_heads=4, num_kv_heads=2, head_dim=head_dim, rotary_dim=rotary_dim)


def angles(width: int, positions: int) -> np.ndarray:
    return np.arange(positions)[:, None] * 0.7 ** np.arange(width // 2)


def turned_as_published(x: np.ndarray, angle: np.ndarray, width: int) -> np.ndarray:
    """Hugging Face's rotate_half over the first `width` channels; the others pass."""
    head, rest = x[:width], x[width:]
    half = np.concatenate([-head[width // 2 :], head[: width // 2]])
    twice = np.concatenate([angle, angle])
    return np.concatenate([head * np.cos(twice) + half * np.sin(twice), rest])


def turned_by_the_kernels(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    low, high = np.split(x, 2)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin])


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 96), (64, 16), (80, 32), (96, 96), (64, 0)])
def test_scores_are_those_of_the_published_partial_rope(head_dim: int, rotary_dim: int) -> None:
    spec = model(head_dim, rotary_dim)
    width = rotary_dim or head_dim
    q, k = RNG.standard_normal((2, head_dim))
    angle = angles(width, 9)
    cos, sin = (whole_table(spec, f(angle), fill) for f, fill in ((np.cos, 1.0), (np.sin, 0.0)))
    assert cos.shape == sin.shape == (9, head_dim // 2)
    rows = np.concatenate([np.tile(q, 4), np.tile(k, 2), np.arange(2 * head_dim)])[:, None]
    ordered = order_stacked(spec, rows)
    assert np.array_equal(ordered[6 * head_dim :], rows[6 * head_dim :])  # values keep their order
    for i, j in ((0, 0), (3, 8), (7, 2)):
        expected = turned_as_published(q, angle[i], width) @ turned_as_published(k, angle[j], width)
        for head, kv_head in ((0, 4), (3, 5)):
            own_q = ordered[head * head_dim : (head + 1) * head_dim, 0]
            own_k = ordered[kv_head * head_dim : (kv_head + 1) * head_dim, 0]
            got = turned_by_the_kernels(own_q, cos[i], sin[i]) @ turned_by_the_kernels(own_k, cos[j], sin[j])
            assert abs(got - expected) < 1e-5


def test_an_adapters_rows_follow_those_of_the_weight() -> None:
    spec = model(64, 48)
    order = head_order(spec)
    assert order is not None and sorted(order) == list(range(64))
    b = {"q_proj": RNG.standard_normal((256, 3)), "k_proj": RNG.standard_normal((128, 3)),
         "v_proj": RNG.standard_normal((128, 3)), "o_proj": RNG.standard_normal((2048, 3))}  # fmt: skip
    a = np.ones((3, 2048), np.float32)
    made = tuple(LoraTensors(0, name, a, rows.astype(np.float32), 0.5) for name, rows in b.items())
    ordered = {item.target: item.b for item in order_adapter(spec, LoraAdapter(made, "x")).tensors}
    assert np.array_equal(ordered["q_proj"][64:128], made[0].b[64:128][order])
    assert np.array_equal(ordered["k_proj"][:64], made[1].b[:64][order])
    assert np.array_equal(ordered["v_proj"], made[2].b) and np.array_equal(ordered["o_proj"], made[3].b)
    assert order_adapter(model(64, 0), LoraAdapter(made, "x")).tensors is made


def test_layers_without_positions_get_a_table_that_turns_nothing() -> None:
    spec = replace(SHAPES["llama-1b"], num_layers=3, layer_ropes=("global", "none", "local"), max_context=5)
    assert layer_rope_stems(spec) == ["rope", "rope.none", "rope.local"]
    tables = no_rope_tables(spec)
    x = RNG.standard_normal(64)
    assert np.array_equal(turned_by_the_kernels(x, tables["rope.none.cos"][4], tables["rope.none.sin"][4]), x)
    assert layer_rope_stems(SHAPES["llama-1b"]) == [] and no_rope_tables(SHAPES["llama-1b"]) == {}
