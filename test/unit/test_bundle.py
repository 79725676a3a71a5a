"""A bundle is whole or it is refused, by the name of the file and what is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgellm_ros.bundle import Bundle
from edgellm_ros.errors import BundleError
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
        (lambda m: m["files"].update({"/etc/hosts": {"size": 1, "sha256": ""}}), "outside the bundle"),
    ],
)
def test_a_manifest_from_elsewhere_is_refused_by_field(change: Callable, message: str, copy: Path) -> None:
    edit(copy, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


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
