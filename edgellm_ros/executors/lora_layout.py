"""How an adapter lies beside a bundle's stacked linear layers: A [in, R] and B [R, out] for each of them.

A bundle stores q, k and v (and gate, up) as one linear layer, so their matrices are packed into one pair: the columns
of A side by side, B block by block, so that x A B is each projection's own part of the layer's output:

    A = [Aq Ak Av]      B = | Bq  0   0  |      R = rank of q + rank of k + rank of v
                            | 0   Bk  0  |      a projection that the adapter leaves alone has rank 0
                            | 0   0   Bv |

B has the scale (alpha / rank) in it. That is the form of `lora/NAME.safetensors`, and of the graphs' LoRA inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from edgellm_ros.bundle import Bundle
from edgellm_ros.errors import BundleError, RequestError
from edgellm_ros.executors.kv_scales import projection_factors
from edgellm_ros.executors.lora import LoraAdapter, LoraTensors
from edgellm_ros.manifest import ModelSpec
from edgellm_ros.weight_file import WeightFile

FloatArray = npt.NDArray[np.float32]
FUSED = {"qkv_proj": "attn.qkv", "gate_up_proj": "mlp.gate_up"}  # projections that Phi-3 has stacked itself
LARGEST_RANK = 64  # of a projection: what the graphs and the CUDA kernels are made for


@dataclass(frozen=True)
class Stack:
    """One stored linear layer and the projections that are stacked in it."""

    stem: str  # its name after `layers.N.`
    in_features: int
    parts: tuple[tuple[str, int], ...]  # projection and its output features, in the stored order

    @property
    def out_features(self) -> int:
        """Rows of the stored weight."""
        return sum(width for _, width in self.parts)


@dataclass(frozen=True)
class PackedLora:
    """An adapter as a bundle holds it; arrays are views of the mapped file."""

    name: str
    fingerprint: str
    matrices: Mapping[tuple[int, str], tuple[FloatArray, FloatArray]]  # (layer, stem) -> A [in, R], B [R, out]
    ranks: Mapping[tuple[int, str], tuple[int, ...]]  # the parts' ranks, whose sum is R

    @property
    def rank(self) -> int:
        """The largest rank of its projections."""
        return max((rank for ranks in self.ranks.values() for rank in ranks), default=0)


def stacks_of(model: ModelSpec) -> tuple[Stack, ...]:
    """The linear layers of a decoder layer, in the order in which they are computed."""
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return (
        Stack("attn.qkv", model.hidden_size, (("q_proj", q), ("k_proj", kv), ("v_proj", kv))),
        Stack("attn.o", q, (("o_proj", model.hidden_size),)),
        Stack(
            "mlp.gate_up",
            model.hidden_size,
            (("gate_proj", model.intermediate_size), ("up_proj", model.intermediate_size)),
        ),
        Stack("mlp.down", model.intermediate_size, (("down_proj", model.hidden_size),)),
    )


def fit(adapter: LoraAdapter, model: ModelSpec, max_rank: int, remedy: str = "") -> LoraAdapter:
    """The adapter with its stacked projections taken apart, as `pack` wants it, scaled as the stored projections are.

    Raises RequestError that names the first tensor which is not of this model or is over `max_rank`.
    """
    _check_fits(adapter, model, max_rank, remedy)
    tensors: dict[tuple[int, str], LoraTensors] = {}
    for item in adapter.tensors:
        for part in _take_apart(item, model):
            if (part.layer, part.target) in tensors:
                raise RequestError(f"layers.{part.layer}: {item.target} is changed twice; the adapter is damaged")
            factor = projection_factors(model, part.layer).get(part.target, 1.0)
            tensors[part.layer, part.target] = replace(part, scale=part.scale * factor)
    return replace(adapter, tensors=tuple(tensors.values()))


def _take_apart(item: LoraTensors, model: ModelSpec) -> list[LoraTensors]:
    """Rows of B for each projection that is stacked in `item`, which all have its A."""
    stack = next((s for s in stacks_of(model) if FUSED.get(item.target) == s.stem), None)
    if stack is None:
        return [item]
    _, rows = _blocks(stack, [0] * len(stack.parts))
    return [
        LoraTensors(item.layer, target, item.a, item.b[part], item.scale)
        for (target, _), part in zip(stack.parts, rows, strict=True)
    ]


def _check_fits(adapter: LoraAdapter, model: ModelSpec, max_rank: int, remedy: str) -> None:
    shapes = {target: (width, s.in_features) for s in stacks_of(model) for target, width in s.parts}
    whole = {stack.stem: (stack.out_features, stack.in_features) for stack in stacks_of(model)}
    shapes |= {target: whole[stem] for target, stem in FUSED.items()}
    other = f"; the adapter was made for another model than {model.name}"
    for item in adapter.tensors:
        name = f"layers.{item.layer}.{item.target}"
        if item.layer >= model.num_layers:
            raise RequestError(f"{name}: the model has layers 0 to {model.num_layers - 1}{other}")
        if item.target not in shapes:
            raise RequestError(f"{name}: the model has no such projection; it has {', '.join(shapes)}")
        rank = len(item.a)
        out, width = shapes[item.target]
        if item.a.shape != (rank, width):
            raise RequestError(f"{name}.lora_A is {list(item.a.shape)}; it must be [rank, {width}]{other}")
        if item.b.shape != (out, rank):
            raise RequestError(f"{name}.lora_B is {list(item.b.shape)}; it must be [{out}, {rank}]{other}")
        if rank > max_rank:
            if rank > LARGEST_RANK:
                remedy = f"; none takes more than {LARGEST_RANK}: merge it with `edgellm lora merge`"
            raise RequestError(f"{name} has rank {rank}; at most {max_rank} is possible{remedy}")


def pack(adapter: LoraAdapter, model: ModelSpec) -> tuple[dict[str, FloatArray], dict[str, str]]:
    """The tensors and the metadata of `lora/NAME.safetensors`, of an adapter that `fit` returned."""
    matrices, ranks = pack_matrices(adapter, model)
    tensors = {}
    for (layer, stem), (a, b) in matrices.items():
        tensors[f"layers.{layer}.{stem}.lora_A"], tensors[f"layers.{layer}.{stem}.lora_B"] = a, b
    sizes = {f"layers.{layer}.{stem}": found for (layer, stem), found in ranks.items()}
    return tensors, {"format": "edgellm_ros lora 1", "ranks": json.dumps(sizes)}


def pack_matrices(
    adapter: LoraAdapter, model: ModelSpec
) -> tuple[dict[tuple[int, str], tuple[FloatArray, FloatArray]], dict[tuple[int, str], tuple[int, ...]]]:
    """A [in, R] and B [R, out] of each stacked layer that the adapter changes, and the ranks of their parts."""
    by_place = {(item.layer, item.target): item for item in adapter.tensors}
    matrices: dict[tuple[int, str], tuple[FloatArray, FloatArray]] = {}
    ranks: dict[tuple[int, str], tuple[int, ...]] = {}
    for layer in range(model.num_layers):
        for stack in stacks_of(model):
            items = [by_place.get((layer, target)) for target, _ in stack.parts]
            sizes = [0 if item is None else len(item.a) for item in items]
            if not any(sizes):
                continue
            a = np.zeros((stack.in_features, sum(sizes)), np.float32)
            b = np.zeros((sum(sizes), stack.out_features), np.float32)
            for item, rows, cols in zip(items, *_blocks(stack, sizes), strict=True):
                if item is not None:
                    a[:, rows] = item.a.T
                    b[rows, cols] = (np.float32(item.scale) * item.b).T
            matrices[layer, stack.stem], ranks[layer, stack.stem] = (a, b), tuple(sizes)
    return matrices, ranks


def open_packed(bundle: Bundle, name: str) -> PackedLora:
    """The bundle's adapter `name`, mapped.

    Raises RequestError that names the adapters which are there for one that is not, BundleError for a file that is not
    whole or was packed for other weights.
    """
    path = bundle.lora_file(name)
    entry = bundle.manifest.files[bundle.lora_key(name)]
    file = WeightFile(path)
    model = bundle.manifest.model
    try:
        stored = {at: tuple(map(int, sizes)) for at, sizes in json.loads(file.metadata["ranks"]).items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is no packed adapter: {error!r}; pack it again with `edgellm lora pack`") from error
    matrices, ranks = {}, {}
    for layer in range(model.num_layers):
        for stack in stacks_of(model):
            at = f"layers.{layer}.{stack.stem}"
            if at not in stored:
                continue
            total = sum(stored[at])
            a, b = file[f"{at}.lora_A"], file[f"{at}.lora_B"]
            wanted = (stack.in_features, total), (total, stack.out_features)
            if (a.shape, b.shape) != wanted or len(stored[at]) != len(stack.parts) or a.dtype != np.float32:
                raise BundleError(f"{path}: {at} is {a.shape} and {b.shape}, not {wanted}; pack the adapter again")
            matrices[layer, stack.stem], ranks[layer, stack.stem] = (a, b), stored[at]
    if len(matrices) != len(stored):
        raise BundleError(f"{path} has layers that the model lacks; pack the adapter again")
    return PackedLora(name, entry.sha256, matrices, ranks)


def unpack(packed: PackedLora, model: ModelSpec) -> LoraAdapter:
    """The projections one by one, for an executor that takes them so; B keeps the scale, which is then 1."""
    tensors = []
    stacks = {stack.stem: stack for stack in stacks_of(model)}
    for (layer, stem), (a, b) in packed.matrices.items():
        stack, sizes = stacks[stem], packed.ranks[layer, stem]
        for (target, _), rows, cols in zip(stack.parts, *_blocks(stack, sizes), strict=True):
            if rows.stop > rows.start:
                part = np.ascontiguousarray(a[:, rows].T), np.ascontiguousarray(b[rows, cols].T)
                tensors.append(LoraTensors(layer, target, *part, 1.0))
    return LoraAdapter(tuple(tensors), packed.fingerprint)


def _blocks(stack: Stack, sizes: list[int] | tuple[int, ...]) -> tuple[list[slice], list[slice]]:
    """Where each part's block is in B: its rows (the columns of A), and its columns."""
    rows, cols = np.cumsum([0, *sizes]), np.cumsum([0, *(width for _, width in stack.parts)])
    return [slice(int(a), int(b)) for a, b in pairwise(rows)], [slice(int(a), int(b)) for a, b in pairwise(cols)]
