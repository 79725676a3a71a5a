"""What the cuda executor's kernels do not have is refused by the layer's name, before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from edgellm_ros.benchmark.random_bundle import RandomBundle
from edgellm_ros.bundle import Bundle, LinearFormat
from edgellm_ros.executors.cuda import unsupported_reason
from edgellm_ros.executors.cuda_formats import native_formats

CASES = {
    "nvfp4": ("mlp.down", LinearFormat("nvfp4", 16), r"layers\.0\.mlp\.down of the bundle is nvfp4"),
    "minima": ("attn.qkv", LinearFormat("int4", 64, offset=True), r"attn\.qkv .*offset .*no small zero point"),
    "zeros": ("head", LinearFormat("int8", 64, offset=True, zero_points=True), r"head .*int8 with an offset"),
    "factor": ("attn.o", LinearFormat("int4", 64, input_factor=True), r"attn\.o .*pre_quant_scale"),
    "order": ("attn.o", LinearFormat("int4", 64, input_order=True), r"attn\.o .*desc_act"),
    "blocks": ("mlp.down", LinearFormat("fp8", 128), r"mlp\.down .*fp8 with a scale for each 128 input features"),
    "mixed": ("layers.3.mlp.down", LinearFormat("fp16"), r"layers\.3\.mlp\.down .*is fp16.*attn\.qkv int4"),
}


def with_formats(formats: dict[str, LinearFormat]) -> Bundle:
    made = RandomBundle("llama-8b", "int4")
    quant = replace(made.manifest.quantization, formats=formats)
    return Bundle(Path("x"), replace(made.manifest, quantization=quant))


@pytest.mark.parametrize("case", CASES)
def test_a_format_without_kernels_is_refused_by_the_layers_name(case: str) -> None:
    stem, form, message = CASES[case]
    reason = unsupported_reason(with_formats({stem: form}))
    assert re.search(message, reason) and "--weights" in reason, reason


def test_layers_get_the_narrowest_format_and_group_that_hold_all_of_them() -> None:
    usual = native_formats(with_formats({}))
    assert (usual.layer, usual.group) == ("int4", 64)
    smaller = native_formats(with_formats({"head": LinearFormat("int8", 32)}))
    assert (smaller.layer, smaller.head, smaller.group) == ("int4", "int8", 32)
    wider = native_formats(with_formats({"layers.3.mlp.down": LinearFormat("int8", 128)}))
    assert (wider.layer, wider.group) == ("int8", 64)
    zeros = native_formats(with_formats({"mlp.down": LinearFormat("int4", 128, offset=True, zero_points=True)}))
    assert (zeros.layer, zeros.of("layers.2.attn.o"), zeros.of("embed")) == ("int8", "int8", usual.embedding)
