"""What a build with the project's plugins needs beside the graph: their library, and int4 weights in the kernels' order."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros import trt_plugins
from edgellm_ros.bundle import WEIGHTS, Bundle
from edgellm_ros.manifest import Manifest
from edgellm_ros.errors import ToolchainError, UnsupportedError
from edgellm_ros.toolchain.build.packing import pack_int4, pack_scales

PACKED = "packed.bin"
_ALIGNMENT = 256


def load_plugins(trt: Any) -> Path:
    """Put the plugins into TensorRT's registry, once a process; returns their library.

    Raises ToolchainError where it was not built, or TensorRT does not take it.
    """
    try:
        library = trt_plugins.find_library()
    except UnsupportedError as error:
        raise ToolchainError(f"the decoder needs the project's plugins, and {error}") from error
    registry = trt.get_plugin_registry()

    def missing() -> list[str]:
        names = (trt_plugins.ATTENTION, trt_plugins.INT4_GEMM, trt_plugins.INT8_GEMM)
        return [name for name in names if registry.get_creator(name, trt_plugins.VERSION, trt_plugins.DOMAIN) is None]

    if missing():
        registry.load_library(str(library))
    if lost := missing():
        raise ToolchainError(f"TensorRT {trt.__version__} did not take {', '.join(lost)} from {library}; build edgellm_ros "
                             "again on this machine, with this TensorRT's headers")  # fmt: skip
    return library


def take_bytes(graph: Any, manifest: Manifest) -> None:
    """Make the caches of `graph` (an onnx ModelProto) bytes: the attention plugin writes E4M3 into them."""
    from onnx import TensorProto

    roles = (manifest.graph.past_kv, manifest.graph.present_kv)
    names = {role.format(layer=layer) for role in roles for layer in range(manifest.model.num_layers)}
    for value in (*graph.graph.input, *graph.graph.output):
        if value.name in names:
            value.type.tensor_type.elem_type = TensorProto.INT8


@contextlib.contextmanager
def packed_weights(bundle: Bundle, graph: Any, directory: Path) -> Iterator[Path]:
    """Gives a directory for a parser to read `graph`'s weights from; it is removed at the end.

    It has the weights of the bundle, and those of int4 in the order of the kernels; `graph` (an onnx ModelProto) is
    changed to name these.
    """
    with tempfile.TemporaryDirectory(prefix=".weights-", dir=directory) as name:
        place = Path(name)
        try:
            os.link(bundle.file(WEIGHTS), place / WEIGHTS)
        except OSError:  # a file system without hard links
            os.symlink(bundle.file(WEIGHTS).resolve(), place / WEIGHTS)
        weights = bundle.weights()
        stored = {tensor.name: tensor for tensor in graph.graph.initializer}
        with open(place / PACKED, "wb") as file:
            for node in graph.graph.node:
                if (node.domain, node.op_type) != (trt_plugins.DOMAIN, trt_plugins.INT4_GEMM):
                    continue
                group = next(a.i for a in node.attribute if a.name == "group")
                data, scales = node.input[1:3]
                _append(file, stored[data], pack_int4(weights[data].view(np.uint8)))
                _append(file, stored[scales], pack_scales(weights[scales], group))
        yield place


def _append(file: Any, tensor: Any, values: npt.NDArray[Any]) -> None:
    """Write the values, and make the initializer name them."""
    file.write(bytes(-file.tell() % _ALIGNMENT))
    del tensor.external_data[:], tensor.dims[:]
    tensor.dims.extend(values.shape)
    for key, value in (("location", PACKED), ("offset", file.tell()), ("length", values.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    file.write(np.ascontiguousarray(values).data)
