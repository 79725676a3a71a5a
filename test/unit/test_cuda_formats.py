"""Every stored format has one on the device: its own, or the smallest that holds its numbers, with the cost said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgellm_ros.benchmark.costs import decode_bytes
from edgellm_ros.benchmark.random_bundle import RandomBundle
from edgellm_ros.executors.cuda_formats import as_on_device, native_formats, widenings
from edgellm_ros.manifest import LinearFormat, ModelSpec, QuantSpec

# stem, how it is stored, what the device has
CASES = {
    "int4": ("mlp.down", LinearFormat("int4", 64), ("int4", 64)),
    "int8": ("mlp.down", LinearFormat("int8", 16), ("int8", 16)),
    "a large group": ("mlp.down", LinearFormat("int4", 256), ("int4", 128)),
    "a small group": ("mlp.down", LinearFormat("int8", 8), ("bf16", 0)),
    "fp16": ("layers.3.mlp.down", LinearFormat("fp16"), ("bf16", 0)),
    "fp8": ("attn.o", LinearFormat("fp8", activation="fp8"), ("fp8", 0)),
    "nvfp4": ("mlp.down", LinearFormat("nvfp4", 16), ("int8", 16)),
    "zero points": ("mlp.down", LinearFormat("int4", 128, offset=True, zero_points=True), ("int8", 128)),
    "minima": ("attn.qkv", LinearFormat("int4", 64, offset=True), ("int8_offset", 64)),
    "minima of the embedding": ("embed", LinearFormat("int8", 64, offset=True), ("bf16", 0)),
    "zeros of 8 bit": ("head", LinearFormat("int8", 64, offset=True, zero_points=True), ("int8_offset", 64)),
    "factor before a norm": ("mlp.gate_up", LinearFormat("int4", 64, input_factor=True), ("int4", 64)),
    "factor of the head": ("head", LinearFormat("int4", 64, input_factor=True), ("int4", 64)),
    "factor after shared heads": ("attn.o", LinearFormat("int4", 64, input_factor=True), ("int4", 64)),
    "order of attention": ("attn.o", LinearFormat("int4", 64, input_order=True), ("int4", 64)),
    "order of the head": ("head", LinearFormat("int4", 64, input_order=True), ("bf16", 0)),
    "order of a small group": ("attn.o", LinearFormat("int8", 8, input_order=True), ("bf16", 0)),
    "order of down": ("mlp.down", LinearFormat("int4", 64, input_order=True), ("int4", 64)),
    "blocks": ("mlp.down", LinearFormat("fp8", 128), ("fp8_blocks", 128)),
    "wide blocks": ("mlp.down", LinearFormat("fp8", 192), ("fp8_blocks", 64)),
    "narrow blocks": ("mlp.down", LinearFormat("fp8", 32), ("bf16", 0)),
}


def stored(formats: dict[str, LinearFormat]) -> tuple[ModelSpec, QuantSpec]:
    manifest = RandomBundle("llama-8b", "int4").manifest
    return manifest.model, replace(manifest.quantization, formats=formats)


@pytest.mark.parametrize("case", CASES)
def test_a_layer_gets_the_smallest_format_that_holds_its_numbers_and_no_other_layer_changes(case: str) -> None:
    stem, form, expected = CASES[case]
    usual, found = native_formats(*stored({})), native_formats(*stored({stem: form}))
    changed = {
        name for name in found if (found[name].format, found[name].group) != (usual[name].format, usual[name].group)
    }
    mine = {name for name in found if name == stem or name.endswith(f".{stem}")}
    assert changed <= mine and {(found[name].format, found[name].group) for name in mine} == {expected}


def test_a_factor_after_attention_goes_into_v_where_every_head_has_its_own() -> None:
    model, quant = stored({"attn.o": LinearFormat("int4", 64, input_factor=True)})
    own = replace(model, num_kv_heads=model.num_heads)
    shared_o, own_o = (native_formats(m, quant)["layers.5.attn.o"] for m in (model, own))
    assert shared_o.factor and not own_o.factor and not shared_o.reason


def test_the_device_orders_what_nothing_before_the_layer_can() -> None:
    form = LinearFormat("int4", 64, input_order=True)
    found = native_formats(*stored({kind: form for kind in ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")}))
    assert {stem.split(".", 2)[2] for stem, native in found.items() if native.order} == {
        "attn.qkv", "attn.o", "mlp.gate_up",
    }  # fmt: skip


def test_what_widening_costs_is_said_with_its_reason() -> None:
    model, quant = stored({"mlp.down": LinearFormat("int4", 32, offset=True), "layers.0.attn.o": LinearFormat("fp16")})
    assert widenings(*stored({})) == []
    (line,) = widenings(model, quant)
    weights = model.num_layers * model.hidden_size * model.intermediate_size
    added = weights * (1 + (2 + 2) / 32 - (0.5 + (2 + 4) / 32)) / 1e6
    assert line == f"32 x mlp.down: int4 with offsets that are no small zero points as int8_offset, +{added:.0f} MB"
    plain = decode_bytes(*stored({"layers.0.attn.o": LinearFormat("fp16")}))
    assert decode_bytes(model, quant) - plain == pytest.approx(weights * (1 + 4 / 32 - (0.5 + 2 / 64)), rel=1e-3)
    assert as_on_device(model, as_on_device(model, quant)) == as_on_device(model, quant)


@pytest.mark.parametrize("case", CASES)
def test_the_native_plan_has_the_devices_bytes_layer_by_layer(case: str) -> None:
    from edgellm_ros import native

    module, reason = native.import_module()
    if module is None:
        pytest.skip(reason)
    from edgellm_ros.config import EngineConfig
    from edgellm_ros.executors.cuda import plan_memory

    def weights(formats: dict[str, LinearFormat]) -> int:
        bundle = RandomBundle("llama-8b", "int4")
        bundle.manifest = replace(bundle.manifest, quantization=replace(bundle.manifest.quantization, formats=formats))
        return plan_memory(bundle, EngineConfig(max_context=512))["weights"]

    stem, form, _ = CASES[case]
    model, quant = stored({stem: form})
    expected = decode_bytes(model, quant) - decode_bytes(*stored({}))
    if stem == "embed":  # which a step does not read as a whole
        expected = model.vocab_size * model.hidden_size * (2 - (1 + 2 / 64))
    assert weights({stem: form}) - weights({}) == pytest.approx(expected, rel=0.02, abs=1e6)
