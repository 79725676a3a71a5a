"""Which reader a checkpoint's quantization_config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm_ros.errors import CheckpointError
from edgellm_ros.toolchain.quantized.awq import Awq
from edgellm_ros.toolchain.quantized.base import ORIGINAL, QuantReader, Tensors
from edgellm_ros.toolchain.quantized.compressed_tensors import CompressedTensors
from edgellm_ros.toolchain.quantized.fp8_blocks import Fp8
from edgellm_ros.toolchain.quantized.gptq import Gptq
from edgellm_ros.toolchain.quantized.modelopt import ModelOpt

READERS: dict[str, type[QuantReader]] = {  # by quant_method
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "fp8": Fp8,
    "gptq": Gptq,
    "modelopt": ModelOpt,
}


def create_reader(config: Any, tensors: Tensors) -> QuantReader:
    """The reader for config.json's quantization_config; CheckpointError for an unknown method or a contradiction."""
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{tensors.path}: quantization_config is {config!r}; it must be an object; {ORIGINAL}")
    method = config.get("quant_method")
    reader = READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise CheckpointError(
            f"{tensors.path}: quantization_config: quant_method is {method!r}; read are {', '.join(READERS)}; "
            f"{ORIGINAL}"
        )
    return reader(config, tensors)
