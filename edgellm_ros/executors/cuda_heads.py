"""Rope as the kernels know it: pairs (i, i + head_dim / 2) of a whole head, one table a layer.

A model that turns only the first `rotary_dim` channels of a head pairs (i, i + rotary_dim / 2). Queries and keys are
multiplied with each other and nothing else, so their channels may be stored in another order: the turned halves go to
the beginnings of the kernels' halves, the others behind them, where the tables say no turn. Values keep their order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.executors.lora import LoraAdapter, LoraTensors
from edgellm_ros.manifest import NO_ROPE, ROPE_STEMS, ModelSpec

NO_ROPE_STEM = "rope.none"
Array = npt.NDArray[Any]


def layer_rope_stems(model: ModelSpec) -> list[str]:
    """The stem of each layer's tables; empty when all layers have the model's only ones."""
    if not model.layer_ropes:
        return []
    return [NO_ROPE_STEM if kind == NO_ROPE else ROPE_STEMS[kind] for kind in model.layer_ropes]


def head_order(model: ModelSpec) -> npt.NDArray[np.intp] | None:
    """(head_dim,): which of the model's channels lies where; None: as they are."""
    turned = model.num_rotated
    if turned == model.head_dim:
        return None
    half, rest = turned // 2, (model.head_dim - turned) // 2
    first, others = np.arange(half), turned + np.arange(rest)
    order: npt.NDArray[np.intp] = np.concatenate([first, others, first + half, others + rest])
    return order


def order_stacked(model: ModelSpec, rows: Array) -> Array:
    """`rows` (qkv width, …), one for each row of the stacked projection, with those of queries and keys in order."""
    order = head_order(model)
    if order is None:
        return rows
    num_ordered = (model.num_heads + model.num_kv_heads) * model.head_dim
    heads = rows[:num_ordered].reshape(-1, model.head_dim, *rows.shape[1:])
    return np.concatenate([heads[:, order].reshape(num_ordered, *rows.shape[1:]), rows[num_ordered:]])


def order_vector(model: ModelSpec, values: Array, stem: str) -> Array:
    """A bias of the stacked projection (qkv width,), or a head norm's gain (head_dim,), as the weight's rows are."""
    order = head_order(model)
    if order is None:
        return values
    return order_stacked(model, values) if stem.endswith("attn.qkv") else values[order]


def order_adapter(model: ModelSpec, adapter: LoraAdapter) -> LoraAdapter:
    """The adapter with the rows of B for queries and keys in order."""
    order = head_order(model)
    if order is None:
        return adapter
    tensors = tuple(_order_b(item, model.head_dim, order) for item in adapter.tensors)
    return LoraAdapter(tensors, adapter.fingerprint)


def _order_b(item: LoraTensors, head_dim: int, order: npt.NDArray[np.intp]) -> LoraTensors:
    if item.target not in ("q_proj", "k_proj"):
        return item
    b = item.b.reshape(-1, head_dim, item.b.shape[1])[:, order].reshape(item.b.shape)
    return LoraTensors(item.layer, item.target, item.a, np.ascontiguousarray(b), item.scale)


def whole_table(model: ModelSpec, values: Array, fill: float) -> Array:
    """(positions, rotary_dim / 2) cosines (fill 1) or sines (fill 0) with the channels that are not turned behind."""
    missing = model.head_dim // 2 - values.shape[1]
    if missing == 0:
        return values
    return np.pad(values.astype(np.float32), ((0, 0), (0, missing)), constant_values=fill)


def no_rope_tables(model: ModelSpec) -> dict[str, Array]:
    """The tables of layers that do not know positions, by name; empty when there are none."""
    if NO_ROPE not in model.layer_ropes:
        return {}
    shape = (model.max_context, model.head_dim // 2)
    return {f"{NO_ROPE_STEM}.cos": np.ones(shape, np.float32), f"{NO_ROPE_STEM}.sin": np.zeros(shape, np.float32)}
