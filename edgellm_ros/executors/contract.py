"""The tensor contract of the portable decoder, written once: names, roles, shapes and dtypes of inputs and outputs.

Export declares the graph's inputs and outputs from it, the build compares a parsed network with it, and the runtime
compares an engine's bindings with it and binds memory by it. The names are the manifest's (GraphSpec); a size that
varies has a name instead of a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from edgellm_ros.executors.lora_layout import stacks_of
from edgellm_ros.manifest import GraphSpec, ModelSpec

BATCH, SEQUENCE, CAPACITY, NUM_LOGITS = "batch", "sequence", "capacity", "num_logits"
VARIES = -1  # of a size in an engine
ROLES = (
    "embeds", "positions", "write_indices", "logit_indices", "past_key", "past_value", "lora_a", "lora_b",  # inputs
    "logits", "present_key", "present_value",  # outputs
    "past_kv", "present_kv",  # of the plugin dialect, in place of keys and values apart
    "mask", "tree_masks",  # of a decoder that takes trees of drafts: one for each window; of the plugin dialect
)  # fmt: skip
# Not the manifest's: `edgellm build --trees` makes these inputs, of a node that has the first of the names.
MASK, TREE_MASKS = "mask.{window}", "tree_masks"
DIALECTS = ("standard", "plugin")  # decoder.onnx, decoder.plugin.onnx
_OUTPUTS = ("logits", "present_key", "present_value", "present_kv")


@dataclass(frozen=True)
class TensorContract:
    """One input or output of the decoder."""

    name: str
    role: str  # of ROLES
    shape: tuple[int | str, ...]
    dtype: str  # float16, bfloat16, float32, int64, int8
    layer: int = -1  # of cache and adapters
    stem: str = ""  # of adapters: the linear layer, such as attn.qkv
    window: int = 0  # of a mask

    @property
    def is_input(self) -> bool:
        """Whether the decoder reads it."""
        return self.role not in _OUTPUTS

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape with VARIES for every size that has a name."""
        return tuple(size if isinstance(size, int) else VARIES for size in self.shape)


def decoder_contract(
    model: ModelSpec, graph: GraphSpec, *, lora: bool = False, activations: str = "", capacity: int = 0,
    dialect: str = "standard", trees: bool = False, cache_dtype: str = "",
) -> tuple[TensorContract, ...]:
    """Every input and output of `decoder.onnx`; with `lora`, of `decoder.lora.onnx`.

    activations: their dtype where it is not the graph's own (an engine in bfloat16). capacity: the cache's, where it is
    fixed, as an engine needs it; 0 leaves it open. dialect: one of DIALECTS,
    or auto as reports of older engines have it, which is standard. trees: as `edgellm build --trees` makes it.
    cache_dtype: the cache's where it is not the activations' (int8: bytes of E4M3).
    """
    dtype = activations or graph.activation_dtype
    found = [
        TensorContract(graph.embeds, "embeds", (BATCH, SEQUENCE, model.hidden_size), dtype),
        TensorContract(graph.positions, "positions", (BATCH, SEQUENCE), "int64"),
        TensorContract(graph.write_indices, "write_indices", (BATCH,), "int64"),
        TensorContract(graph.logit_indices, "logit_indices", (NUM_LOGITS,), "int64"),
        TensorContract(graph.logits, "logits", (NUM_LOGITS, model.num_rows), "float32"),
    ]
    cache: tuple[int | str, ...] = (BATCH, model.num_kv_heads, capacity or CAPACITY, model.head_dim)
    roles = ["past_key", "present_key", "past_value", "present_value"]
    if dialect == "plugin":
        cache, roles = (BATCH, 2, *cache[1:]), ["past_kv", "present_kv"]
    for layer in range(model.num_layers):
        for role in roles:
            name = getattr(graph, role).format(layer=layer)
            found.append(TensorContract(name, role, cache, cache_dtype or dtype, layer))
    if trees and dialect == "plugin":
        found.append(TensorContract(TREE_MASKS, "tree_masks", (BATCH, SEQUENCE), "int64"))
    elif trees:
        for window in mask_windows(model):
            shape = (BATCH, 1, SEQUENCE, capacity or CAPACITY)
            found.append(TensorContract(MASK.format(window=window), "mask", shape, dtype, window=window))
    if lora:
        for layer in range(model.num_layers):
            for stack in stacks_of(model):
                found += lora_contract(graph, layer, stack.stem, stack.in_features, stack.out_features, dtype)
    return tuple(found)


def mask_windows(model: ModelSpec) -> list[int]:
    """The windows of the layers' attention, 0 for none; each has a mask."""
    return sorted(set(model.sliding_windows or (0,)))


def lora_contract(
    graph: GraphSpec, layer: int, stem: str, in_features: int, out_features: int, dtype: str
) -> tuple[TensorContract, TensorContract]:
    """A [in, R] and B [R, out] of one linear layer; R is 0 without an adapter."""
    rank = f"layers.{layer}.{stem}.rank"
    a = TensorContract(graph.lora_a.format(layer=layer, stem=stem), "lora_a", (in_features, rank), dtype, layer, stem)
    b = replace(a, name=graph.lora_b.format(layer=layer, stem=stem), role="lora_b", shape=(rank, out_features))
    return a, b


def lora_ranks(model: ModelSpec, graph: GraphSpec) -> dict[str, int]:
    """The largest R of each LoRA input: every projection that is stacked in its layer with the largest rank."""
    return {
        name.format(layer=layer, stem=stack.stem): graph.max_lora_rank * len(stack.parts)
        for layer in range(model.num_layers)
        for stack in stacks_of(model)
        for name in (graph.lora_a, graph.lora_b)
    }


def tensor_faults(
    wanted: Iterable[TensorContract], inputs: dict[str, tuple[tuple[int, ...], str]],
    outputs: dict[str, tuple[tuple[int, ...], str]],
) -> list[str]:  # fmt: skip
    """Every difference between the contract and what a network or an engine has, as name -> (sizes, dtype)."""
    faults = []
    contract = tuple(wanted)
    for what, have in (("input", inputs), ("output", outputs)):
        want = {t.name: (t.sizes, t.dtype) for t in contract if t.is_input == (what == "input")}
        faults += [f"{what} {name} is missing" for name in want if name not in have]
        for name, (sizes, dtype) in have.items():
            if name not in want:
                faults.append(f"{what} {name} {sizes} is not in the manifest")
            elif (sizes, dtype) != want[name]:
                wanted_sizes, wanted_dtype = want[name]
                faults.append(f"{what} {name} is {dtype} {sizes}; the manifest says {wanted_dtype} {wanted_sizes}")
    return faults
