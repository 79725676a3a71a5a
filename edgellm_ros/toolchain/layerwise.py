"""Runs an exported decoder's first step a layer at a time, so that ONNX Runtime never holds the whole model.

A session folds, widens and packs all weights of its graph: a head of fp16 takes twice its size, and a layer of fp8 four
times. Here every session gets one layer of the file that was written, and some rows of the head; the nodes and the
bytes that they name are the file's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgellm_ros.bundle import DECODER_ORT, Bundle
from edgellm_ros.errors import BundleError
from edgellm_ros.executors import ort_windows
from edgellm_ros.executors.embedding import EmbeddingTable
from edgellm_ros.memory import physical_cores

FloatArray = npt.NDArray[np.float32]
_Values = dict[str, npt.NDArray[Any]]  # by their names in the graph

HEAD_PARTS = 32  # sessions that share the head at most: one widens its part to fp32 while it loads
_LEAST_NUMBERS = 1 << 20  # of a part: a session takes some milliseconds to make
_LAYER = re.compile(r"layers\.(\d+)\.")
_WHOLE = (".input_factor", ".input_order")  # of a head's tensors, those that have no row for each token


def first_logits(bundle: Bundle, prompts: Sequence[npt.NDArray[np.int32]], counts: Sequence[int]) -> list[FloatArray]:
    """Logits (count, rows of the head) of each prompt's last positions, as `decoder.ort.onnx` computes them.

    Raises BundleError when ONNX Runtime refuses a part of the graph.
    """
    model, names = bundle.manifest.model, bundle.manifest.graph
    whole = onnx.load(str(bundle.file(DECODER_ORT)), load_external_data=False)
    values = [_inputs(bundle, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    parts = _split(whole, model.num_layers)
    for part in parts[:-1]:
        _run(bundle.path, part, values)
    columns: list[list[FloatArray]] = [[] for _ in prompts]
    stem = bundle.manifest.quantization.head_tensor(model)
    step = max(-(-model.num_rows // HEAD_PARTS), -(-_LEAST_NUMBERS // model.hidden_size))
    for part in _by_rows(parts[-1], stem, model.num_rows, step):
        _run(bundle.path, part, values)
        for found, value in zip(columns, values, strict=True):
            found.append(value.pop(names.logits))
    return [np.concatenate(found, -1) for found in columns]


def _inputs(bundle: Bundle, prompt: npt.NDArray[np.int32], count: int) -> _Values:
    """The graph's inputs for a first step over the whole prompt."""
    model, names, length = bundle.manifest.model, bundle.manifest.graph, len(prompt)
    embeds = np.empty((length, model.hidden_size), np.float32)
    EmbeddingTable(bundle).lookup(prompt, embeds)
    found: _Values = {
        names.embeds: embeds[None],
        names.seqlens_k: np.array([length - 1], np.int32),
        names.total_length: np.array(length, np.int32),
        names.logit_indices: np.arange(length - count, length, dtype=np.int64),
    }
    cache = np.zeros((1, model.num_kv_heads, length, model.head_dim), np.float32)
    for layer in range(model.num_layers):
        found |= {name.format(layer=layer): cache for name in (names.past_key, names.past_value)}
    return found


def _split(whole: ModelProto, num_layers: int) -> list[ModelProto]:
    """A model for each layer, and one for what comes after them."""
    groups: list[list[NodeProto]] = [[] for _ in range(num_layers + 1)]
    for node in whole.graph.node:
        match = _LAYER.match(node.name)
        groups[int(match[1]) if match else num_layers].append(node)
    declared = {value.name: value for value in whole.graph.input}
    initializers = {tensor.name: tensor for tensor in whole.graph.initializer}
    wanted = {value.name for value in whole.graph.output} - _caches(whole)
    parts: list[ModelProto] = []
    for group in reversed(groups):  # what later parts read is what a part gives
        made = {name for node in group for name in node.output if name}
        read = list(dict.fromkeys(name for node in group for name in node.input if name and name not in made))
        inputs = [name for name in read if name not in initializers]
        outputs = [name for node in group for name in node.output if name in wanted]
        graph = helper.make_graph(
            group,
            "part",
            [declared.get(name) or helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [initializers[name] for name in read if name in initializers],
        )
        parts.append(helper.make_model(graph, opset_imports=whole.opset_import, ir_version=whole.ir_version))
        wanted = (wanted - made) | {name for name in inputs if name not in declared}
    assert not wanted, wanted
    return parts[::-1]


def _caches(whole: ModelProto) -> set[str]:
    """Outputs that are the cache's: nothing reads them after one step."""
    return {name for node in whole.graph.node if node.op_type == "GroupQueryAttention" for name in node.output[1:]}


def _by_rows(head: ModelProto, stem: str, total: int, step: int) -> Iterator[ModelProto]:
    """The last part for `step` rows of its weight at a time: the same nodes, other ranges of the file's bytes."""
    for start in range(0, total, step):
        stop = min(start + step, total)
        part = ModelProto()
        part.CopyFrom(head)
        for tensor in part.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                if tensor.name.startswith(f"{stem}.") and not tensor.name.endswith(_WHOLE):
                    _cut(tensor, start, stop, total)
            elif tensor.data_type == TensorProto.INT64 and list(tensor.dims) in ([2], [3]):
                shape = numpy_helper.to_array(tensor).copy()
                if shape[0] == total:
                    shape[0] = stop - start
                    tensor.CopyFrom(numpy_helper.from_array(shape, tensor.name))
        for node in part.graph.node:
            for attribute in node.attribute:
                if node.op_type == "MatMulNBits" and attribute.name == "N":
                    attribute.i = stop - start
        yield part


def _cut(tensor: TensorProto, start: int, stop: int, total: int) -> None:
    """Rows start to stop - 1 of an initializer that lies in the weight file."""
    assert tensor.dims[0] == total, (tensor.name, tensor.dims, total)
    place = {entry.key: entry for entry in tensor.external_data}
    row = int(place["length"].value) // total
    place["offset"].value = str(int(place["offset"].value) + start * row)
    place["length"].value = str((stop - start) * row)
    tensor.dims[0] = stop - start


def _run(root: Path, part: ModelProto, values: list[_Values]) -> None:
    """Run a part for every prompt; its outputs join the prompt's values, and what it alone has read leaves them."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry(ort_windows.FOLDER_OPTION, str(root))
    outputs = [value.name for value in part.graph.output]
    for needed in part.graph.input:
        if not needed.type.tensor_type.HasField("shape"):  # ORT 1.30 infers a wrong width without it
            *_, width = values[0][needed.name].shape
            needed.CopyFrom(helper.make_tensor_value_info(needed.name, TensorProto.FLOAT, ["batch", "sequence", width]))
    try:
        graph = ort_windows.for_this_version(part.SerializeToString())
        session = ort.InferenceSession(graph, sess_options=options, providers=["CPUExecutionProvider"])
        for value in values:
            feed = {needed.name: value[needed.name] for needed in part.graph.input}
            value.update(zip(outputs, session.run(outputs, feed), strict=True))
    except Exception as error:  # ONNX Runtime raises a family of its own that derives from Exception alone
        raise BundleError(f"ONNX Runtime cannot run {root / DECODER_ORT}: {error}") from error
