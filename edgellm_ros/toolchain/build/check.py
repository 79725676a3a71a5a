"""Decides whether the parsed network is the one that the manifest promises, with fused attention and cache updates."""

from __future__ import annotations

from collections import Counter
from typing import Any

from edgellm_ros.manifest import Manifest
from edgellm_ros.config import BuildOptions
from edgellm_ros.errors import ToolchainError
from edgellm_ros.executors.contract import tensor_faults
from edgellm_ros.executors.engines import engine_contract
from edgellm_ros.trt_plugins import DOMAIN

_DTYPES = {"HALF": "float16", "FLOAT": "float32", "BF16": "bfloat16", "INT64": "int64", "INT8": "int8"}


def check_network(
    network: Any, graph: Any, manifest: Manifest, options: BuildOptions, warnings: list[str]
) -> dict[str, Any]:
    """Compare names, shapes and layers; returns the layers and their counts for the report.

    network: an INetworkDefinition after parsing; graph: the onnx model it came from; options are resolved. Raises
    ToolchainError that lists everything that differs.
    """
    faults = [*_tensors(network, manifest, options), *(w for w in warnings if "unused input" in w.lower())]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    faults += (_plugins if options.dialect == "plugin" else _attention)(layers, graph, manifest)
    kinds = Counter(_kind(layer.type) for layer in layers)
    operators = Counter(node.op_type for node in graph.graph.node)
    if kinds["DEQUANTIZE"] != operators["DequantizeLinear"]:
        faults.append(f"{operators['DequantizeLinear']} DequantizeLinear became {kinds['DEQUANTIZE']} layers")
    if faults:
        shown = "\n  ".join(faults[:12]) + (f"\n  and {len(faults) - 12} more" if len(faults) > 12 else "")
        raise ToolchainError(f"the parsed network is not what the manifest says; export the model again:\n  {shown}")
    return {"layers": len(layers), "kinds": dict(kinds.most_common()), "table": [_row(layer) for layer in layers]}


def _row(layer: Any) -> list[str]:
    """Name, kind, and dtype and shape of every output."""
    outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
    shapes = [f"{_kind(t.dtype)} {'x'.join('?' if size < 0 else str(size) for size in t.shape)}" for t in outputs]
    return [layer.name, _kind(layer.type), ", ".join(shapes)]


def _tensors(network: Any, manifest: Manifest, options: BuildOptions) -> list[str]:
    assert options.max_context is not None, "options are resolved"
    wanted = engine_contract(manifest, options)
    found_in = [network.get_input(i) for i in range(network.num_inputs)]
    found_out = [network.get_output(i) for i in range(network.num_outputs)]
    return tensor_faults(wanted, _sizes(found_in), _sizes(found_out))


def _sizes(tensors: list[Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {t.name: (tuple(t.shape), _DTYPES.get(_kind(t.dtype), _kind(t.dtype))) for t in tensors}


def _attention(layers: list[Any], graph: Any, manifest: Manifest) -> list[str]:
    names, faults = manifest.graph, []
    updates = {}
    for layer in layers:
        if _kind(layer.type) == "KV_CACHE_UPDATE":
            updates[layer.get_output(0).name] = layer.get_input(0).name
    fused = [layer for layer in layers if _kind(layer.type) == "ATTENTION_INPUT"]
    masked = {layer.get_output(0).name for layer in fused if layer.num_inputs >= 4}
    ends = {}
    for layer in layers:
        if _kind(layer.type) == "ATTENTION_OUTPUT":
            ends[layer.get_output(0).name] = layer.get_input(0).name
    for node in graph.graph.node:
        if node.op_type != "Attention":
            continue
        if ends.get(node.output[0]) is None:
            faults.append(f"{node.name} did not become one fused attention")
        elif ends[node.output[0]] not in masked:
            faults.append(f"{node.name} lost its mask")
        if any(a.name == "TRT_decomposable" and a.i for a in node.attribute):
            faults.append(f"{node.name} is marked as decomposable, so it need not be fused")
    if len(ends) != manifest.model.num_layers:
        faults.append(f"{len(ends)} fused attentions for {manifest.model.num_layers} layers")
    for index in range(manifest.model.num_layers):
        for past, present in ((names.past_key, names.present_key), (names.past_value, names.present_value)):
            source, target = past.format(layer=index), present.format(layer=index)
            if updates.get(target) != source:
                faults.append(f"{target} is not a KV_CACHE_UPDATE of {source} (it is made from {updates.get(target)})")
    return faults


def _plugins(layers: list[Any], graph: Any, manifest: Manifest) -> list[str]:
    found = {layer.get_output(0).name: layer for layer in layers if _kind(layer.type) == "PLUGIN_V3"}
    wanted = [node for node in graph.graph.node if node.domain == DOMAIN]
    faults = [f"{node.name} did not become a plugin" for node in wanted if node.output[0] not in found]
    if len(found) > len(wanted):
        faults.append(f"{len(found)} plugins for {len(wanted)} operators of {DOMAIN}")
    names = manifest.graph
    caches = {layer.get_output(1).name: layer.get_input(1).name for layer in found.values() if layer.num_outputs == 2}
    for index in range(manifest.model.num_layers):
        source, target = names.past_kv.format(layer=index), names.present_kv.format(layer=index)
        if caches.get(target) != source:
            faults.append(f"{target} is not an attention plugin's cache {source} (it is {caches.get(target)})")
    return faults


def _kind(value: Any) -> str:
    return str(value).rpartition(".")[2]
