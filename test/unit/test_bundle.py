"""A bundle is whole or it is refused, by the name of the file and what is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import BundleError
from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor
from edgellm_ros.manifest import SCHEMA_VERSION, Manifest


@pytest.fixture
def copy(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle("llama", "int4").path, tmp_path / "bundle"))


def edit(root: Path, change: Callable[[dict], None]) -> None:
    raw = json.loads((root / "manifest.json").read_text())
    change(raw)
    (root / "manifest.json").write_text(json.dumps(raw))


def test_the_manifest_survives_a_round_trip(tiny_bundle: Callable[..., Bundle]) -> None:
    for kind in ("llama_yarn", "qwen2_window"):
        manifest = tiny_bundle(kind).manifest
        assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("name", ["weights.safetensors", "decoder.ort.onnx", "tokenizer.json", "chat_template.jinja"])
def test_each_missing_truncated_or_changed_file_is_named(name: str, copy: Path) -> None:
    path = copy / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match=f"{name} is truncated: {len(whole) - 1} bytes instead of {len(whole)}"):
        Bundle.open(copy)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleError, match=f"{name} was changed: its sha256"):
        Bundle.open(copy)
    Bundle.open(copy, verify=False)
    path.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle.open(copy, verify=False)


def test_a_directory_that_is_no_bundle_says_what_a_bundle_is(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no readable manifest.json"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="is not a directory; a bundle is what `edgellm export"):
        Bundle.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=SCHEMA_VERSION + 1), "schema_version .* update edgellm_ros"),
        (lambda m: m.pop("schema_version"), "schema_version None.* export the model again"),
        (lambda m: m["model"].pop("num_layers"), "manifest.json: model lacks the field 'num_layers'"),
        (lambda m: m["model"].update(num_layers="3"), "model: num_layers is '3'; it must be of type int"),
        (lambda m: m["model"].update(wings=2), "model has an unknown field 'wings'.*a newer edgellm_ros wrote it"),
        (lambda m: m.update(files=[]), "files is \\[\\]; it must be an object"),
        (lambda m: m["tokens"].update(stop_ids=7), "stop_ids is 7; it must be a list"),
        (lambda m: m["files"].update({"../secret": {"size": 1, "sha256": ""}}), "outside the bundle"),
        (lambda m: m["self_test"].update(cases=[]), "self_test: cases is \\[\\]; it must have one or more.*export the model"),
        (lambda m: m["files"].update({"/etc/hosts": {"size": 1, "sha256": ""}}), "outside the bundle"),
    ],
)
def test_a_manifest_from_elsewhere_is_refused_by_field(change: Callable, message: str, copy: Path) -> None:
    edit(copy, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


def first_case(**fields: object) -> Callable[[dict], None]:
    return lambda m: m["self_test"]["cases"][0].update(fields)


def model(**fields: object) -> Callable[[dict], None]:
    return lambda m: m["model"].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (model(num_layers=0), "model: num_layers is 0; allowed is 1 to 4096"),
        (model(hidden_size=10**30), "model: hidden_size is 10+.*; allowed is 1 to 2147483647"),
        (model(num_kv_heads=-1), "model: num_kv_heads is -1; allowed is 1 to"),
        (model(head_dim=0), "model: head_dim is 0; allowed is 1 to"),
        (model(head_dim=15), "model: head_dim is 15; it must be even"),
        (model(rotary_dim=64), "model: rotary_dim is 64; it must be even and at most head_dim, 16"),
        (model(head_rows=321), "model: head_rows is 321; allowed is 0 to vocab_size, which is 320"),
        (model(max_context=-1), "model: max_context is -1; allowed is 1 to"),
        (model(max_context=0), "model: max_context is 0; allowed is 1 to"),
        (model(max_context=8), r"model: max_context is 8; the self-test's prompts need \d+ or more"),
        (model(rms_norm_eps=-1), "model: rms_norm_eps is -1.0; it must be above 0"),
        (model(rms_norm_eps=float("nan")), "model: rms_norm_eps is nan; it must be a finite number"),
        (model(rope_theta=float("inf")), "model: rope_theta is inf; it must be a finite number"),
        (model(activation="x"), "model: activation is 'x'; allowed are 'silu', 'gelu_tanh'"),
        (model(sliding_windows=[4]), "model: sliding_windows has 1 entries; allowed are 0, or num_layers, which is 3"),
        (model(layer_ropes=["global", "up", "none"]), r"layer_ropes\[1\] is 'up'; allowed are 'global', 'local', 'none'"),
        (model(layer_ropes=["global", "local", "none"]), "local_rope_theta is 0; it must be above 0"),
        (model(kv_scales=[[1.0]] * 3), r"kv_scales\[0\] is \[1.0\]; it must be a list of 2"),
        (lambda m: m["quantization"].update(weights="int3"), "quantization: weights is 'int3'; allowed are 'int4', 'int8'"),
        (lambda m: m["quantization"].update(group_size=0), "quantization: group_size is 0; allowed is 1 or more with int4"),
        (
            lambda m: m["quantization"].update(formats={"attn.o": {"scheme": "int8"}}),
            "quantization: formats: attn.o: group_size is 0; allowed is 1 or more with int8",
        ),
        (lambda m: m["tokens"].update(stop_ids=[2, -1]), r"tokens: stop_ids\[1\] is -1; allowed is 0 to"),
        (lambda m: m["tokens"].update(bos_id=320, add_bos=True), "tokens: bos_id is 320 with add_bos; allowed is 0 to 319"),
        (lambda m: m["graph"].update(logits=""), "graph: logits is ''; it must be a tensor's name"),
        (lambda m: m["graph"].update(past_key="past"), "graph: past_key is 'past'; it must be a name with {layer} in it"),
        (lambda m: m["graph"].update(lora_a="{layer}"), "graph: lora_a is .* with {layer} and {stem} in it"),
        (lambda m: m["self_test"].update(max_error=1e9), "self_test: max_error is 1000000000.0; allowed is 0 to 1"),
        (first_case(prompt_ids=[]), "prompt_ids has 0 entries; allowed are 1 to"),
        (first_case(prompt_ids=[5, 99999999] * 8), r"cases\[0\]: prompt_ids\[1\] is 99999999; allowed is 0 to 319"),
        (first_case(logit_ids=[99999999]), r"cases\[0\]: logit_ids\[0\] is 99999999; allowed is 0 to 319"),
        (first_case(next_ids=[]), "next_ids has 0 entries; allowed are 1 to"),
        (first_case(logits=[1.0]), r"logits has 1 entries; it must have those of logit_ids, \d+"),
    ],
)
def test_a_value_that_no_export_writes_is_refused_by_field_with_what_is_allowed(
    change: Callable, message: str, copy: Path
) -> None:
    edit(copy, change)
    with pytest.raises(BundleError, match=f"manifest.json: .*{message}.*; export the model again"):
        Bundle.open(copy, verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (model(num_layers=4), "model: num_layers is 4; the graph has 3"),
        (model(num_layers=2), "model: num_layers is 2; the graph has 3"),
        (model(hidden_size=65), "model: hidden_size is 65; the graph has 64"),
        (model(num_kv_heads=1), "model: num_kv_heads is 1; the graph has 2"),
        (model(head_dim=32), "model: head_dim is 32; the graph has 16"),
        (model(vocab_size=321), "model: vocab_size is 321; the graph has 320"),
        (model(max_context=512), "model: max_context is 512; the position table has 256 rows"),
        (lambda m: m["graph"].update(logits="x"), "graph: logits is 'x'; the graph's outputs are logits, "),
        (lambda m: m["graph"].update(embeds="x"), "graph: embeds is 'x'; the graph's inputs are inputs_embeds, "),
        (lambda m: m["graph"].update(present_key="x{layer}"), "graph: present_key is 'x{layer}'; the graph's outputs are"),
    ],
)
def test_a_manifest_that_is_not_the_graphs_is_refused_on_load(change: Callable, message: str, copy: Path) -> None:
    edit(copy, change)
    with pytest.raises(BundleError, match=f"manifest.json: {message}.*; export the model again"):
        OnnxRuntimeExecutor(Bundle.open(copy), EngineConfig(max_slots=1))


def test_a_manifest_without_weights_is_refused_on_load(copy: Path) -> None:
    edit(copy, lambda m: m["files"].pop("weights.safetensors"))
    with pytest.raises(BundleError, match=r"has no weights\.safetensors; it holds"):
        OnnxRuntimeExecutor(Bundle.open(copy), EngineConfig(max_slots=1))


def test_a_manifest_that_is_not_json_is_refused(copy: Path) -> None:
    (copy / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="manifest.json is not JSON"):
        Bundle.open(copy)


def test_a_weight_file_with_ranges_past_its_end_is_refused(copy: Path) -> None:
    path = copy / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-200_000 // 100 * 100] if path.stat().st_size > 200_000 else path.read_bytes()[:-64])
    edit(copy, lambda m: m["files"]["weights.safetensors"].update(size=path.stat().st_size))
    with pytest.raises(BundleError, match="is truncated: tensor .* ends at byte"):
        Bundle.open(copy, verify=False).weights()


def test_a_tensor_or_file_that_is_not_there_is_named(tiny_bundle: Callable[..., Bundle]) -> None:
    bundle = tiny_bundle("llama")
    with pytest.raises(BundleError, match="has no tensor 'layers.99'"):
        bundle.weights()["layers.99"]
    with pytest.raises(BundleError, match="has no vision.onnx; it holds chat_template.jinja, decoder.onnx"):
        bundle.file("vision.onnx")
