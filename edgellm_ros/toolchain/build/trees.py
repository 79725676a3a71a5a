"""Turns a decoder into one that verifies trees of drafts: what a token sees is an input, and no longer follows from its
position."""

from __future__ import annotations

from typing import Any

from edgellm_ros.manifest import Manifest
from edgellm_ros.config import BuildOptions
from edgellm_ros.errors import ToolchainError
from edgellm_ros.executors.contract import TensorContract, decoder_contract
from edgellm_ros.trt_plugins import ATTENTION, DOMAIN


def take_trees(graph: Any, manifest: Manifest, options: BuildOptions) -> None:
    """Change `graph` (an onnx ModelProto of `manifest`'s decoder, capacity fixed) in place; options are resolved.

    The masks that a portable decoder makes of its positions become inputs, and what made them goes. The plugins' input of
    trees is bound. Raises ToolchainError for a graph that is not this version's.
    """
    contract = decoder_contract(
        manifest.model, manifest.graph, capacity=options.max_context or 0, dialect=options.dialect, trees=True
    )
    masks = [tensor for tensor in contract if tensor.role in ("mask", "tree_masks")]
    nodes = list(graph.graph.node)
    if options.dialect == "plugin":
        changed = [node for node in nodes if (node.domain, node.op_type) == (DOMAIN, ATTENTION)]
        for node in changed:
            next(a for a in node.attribute if a.name == "tree").i = 1
            node.input.append(masks[0].name)
        if not changed:
            raise ToolchainError(f"the decoder has no {ATTENTION}; export the model again with --dialect plugin")
    else:
        names = {mask.name for mask in masks}
        made = {name for node in nodes for name in node.output}
        if not names <= made:
            raise ToolchainError(f"the decoder makes no {', '.join(sorted(names - made))}; export the model again")
        nodes = _used([node for node in nodes if not names & set(node.output)], graph)
        del graph.graph.node[:]
        graph.graph.node.extend(nodes)
    graph.graph.input.extend(_input(mask) for mask in masks)


def _used(nodes: list[Any], graph: Any) -> list[Any]:
    """Of `nodes`, in the order of computation, those that an output needs."""
    needed = {value.name for value in graph.graph.output}
    kept = []
    for node in reversed(nodes):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    return kept[::-1]


def _input(tensor: TensorContract) -> Any:
    from onnx import TensorProto, helper

    dtypes = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
    return helper.make_tensor_value_info(tensor.name, dtypes[tensor.dtype], list(tensor.shape))
