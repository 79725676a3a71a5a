"""What the cuda executor's kernels do not have is refused by the layer's name, before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from edgellm_ros.benchmark.random_bundle import RandomBundle
from edgellm_ros.bundle import Bundle, LinearFormat
from edgellm_ros.executors.cuda import unsupported_reason

CASES = {
    "nvfp4": ("mlp.down", LinearFormat("nvfp4", 16), r"layers\.0\.mlp\.down of the bundle is nvfp4"),
    "zeros": ("attn.qkv", LinearFormat("int4", 64, offset=True), r"attn\.qkv .*offset .*zero points"),
    "factor": ("attn.o", LinearFormat("int4", 64, input_factor=True), r"attn\.o .*pre_quant_scale"),
    "blocks": ("mlp.down", LinearFormat("fp8", 128), r"mlp\.down .*fp8 with a scale for each 128 input features"),
    "mixed": ("layers.3.mlp.down", LinearFormat("int8", 64), r"layers\.3\.mlp\.down .*is int8.*attn\.qkv int4"),
    "groups": ("head", LinearFormat("int8", 32), "head .*groups of 32, the layers of 64"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_format_without_kernels_is_refused_by_the_layers_name(case: str) -> None:
    stem, form, message = CASES[case]
    made = RandomBundle("llama-8b", "int4")
    quant = replace(made.manifest.quantization, formats={stem: form})
    reason = unsupported_reason(Bundle(Path("x"), replace(made.manifest, quantization=quant)))
    assert re.search(message, reason) and "--weights" in reason, reason
