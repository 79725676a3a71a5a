"""What the cuda executor is given of every stored format computes what the checkpoint's dequantised weights compute.

The device is stood in for by the weights that it would have, dequantised here by the kernels' own description of their
formats (native/include/edgellm/kernels/types.hpp), and the plain NumPy decoder; the oracle is transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import test_quantized_formats
import test_quantized_modelopt
import tiny
import torch
import transformers
from test_export import PROMPT, hf_logits, relative_error
from test_quantized_gguf import dequantised, pack_q4_k, pack_q6_k

from edgellm_ros.bundle import Bundle
from edgellm_ros.executors.cuda import _upload
from edgellm_ros.executors.cuda_formats import linear_shapes, native_formats
from edgellm_ros.executors.cuda_inputs import LayerInputs
from edgellm_ros.executors.lora import LoraAdapter, LoraTensors
from edgellm_ros.manifest import ROPE_STEMS
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.reference import ReferenceDecoder

MODELOPT = {f"modelopt {case}": case for case in test_quantized_modelopt.CASES}
ROUNDING = 3e-3  # of scales to fp16; bf16 comes on the device


class Device:
    """Takes what the native decoder takes, checks it against the formats that the plan has, and dequantises it."""

    def __init__(self, bundle: Bundle) -> None:
        self.model, quant = bundle.manifest.model, bundle.manifest.quantization
        self.formats = native_formats(self.model, quant)
        self.tensors: dict[str, np.ndarray] = {}
        self.orders: dict[str, np.ndarray] = {}
        self.undone: set[str] = set()
        _upload(self, bundle)

    def load_vector(self, name: str, values: np.ndarray) -> None:
        self.tensors[name] = np.asarray(values, np.float32)

    def load_order(self, stem: str, order: np.ndarray) -> None:
        assert self.formats[stem].order and order.dtype == np.int32
        self.orders[stem] = order

    def load_linear(self, stem: str, values: np.ndarray, scale: np.ndarray | None) -> None:
        form = self.formats[stem]
        shapes = {"embed": (self.model.vocab_size, self.model.hidden_size)}
        shapes["head"] = (self.model.num_rows, self.model.hidden_size)
        rows, columns = shapes.get(stem) or linear_shapes(self.model)[stem.split(".", 2)[2]]
        if form.format in ("int4", "int8"):
            assert scale is not None and scale.dtype == np.float16 and scale.shape == (rows, columns // form.group)
            if form.format == "int4":
                assert values.dtype == np.uint8 and values.shape == (rows, columns // 2)
                both = np.stack([values & 15, values >> 4], -1).reshape(rows, columns).astype(np.int16)
                values = np.where(both > 7, both - 16, both)
            else:
                assert values.dtype == np.int8
            dense = values.astype(np.float32) * np.repeat(scale.astype(np.float32), form.group, 1)
        elif form.format == "int8_offset":
            assert scale is not None and scale.dtype == np.float16 and scale.shape == (rows, columns // form.group, 2)
            assert values.dtype == np.int8
            wide = np.repeat(scale.astype(np.float32), form.group, 1)
            dense = values * wide[..., 0] + wide[..., 1]
        elif form.format == "fp8_blocks":
            assert scale is not None and scale.dtype == np.float32 and scale.shape == (rows, columns // form.group)
            dense = values.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.repeat(scale, form.group, 1)
        elif form.format == "fp8":
            assert (
                scale is not None and scale.dtype == np.float32 and scale.shape == (rows,) and values.dtype == np.uint8
            )
            dense = values.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale[:, None]
        else:
            assert form.format == "bf16" and scale is None and values.dtype in (np.float16, np.float32)
            dense = values.astype(np.float32)
        assert dense.shape == (rows, columns)
        self.tensors[f"{stem}.weight"] = dense

    def add(self, adapter: LoraAdapter) -> None:
        """W + scale B A, for each projection of the stacked layers."""
        m = self.model
        q, kv, inner = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim, m.intermediate_size
        places = {
            "q_proj": ("attn.qkv", 0), "k_proj": ("attn.qkv", q), "v_proj": ("attn.qkv", q + kv), "o_proj": ("attn.o", 0),
            "gate_proj": ("mlp.gate_up", 0), "up_proj": ("mlp.gate_up", inner), "down_proj": ("mlp.down", 0),
        }  # fmt: skip
        for item in adapter.tensors:
            stem, first = places[item.target]
            self.tensors[f"layers.{item.layer}.{stem}.weight"][first : first + len(item.b)] += (
                item.scale * item.b @ item.a
            )

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """(tokens, rows)."""
        self._undo_maps()
        stems = {kind: stem for kind, stem in ROPE_STEMS.items() if f"{stem}.cos" in self.tensors}
        ropes = {kind: (self.tensors[f"{stem}.cos"], self.tensors[f"{stem}.sin"]) for kind, stem in stems.items()}
        decoder = ReferenceDecoder(self.model, ropes)
        decoder.embed(self.tensors["embed.weight"], [np.asarray(ids, np.int64)])
        for layer in range(self.model.num_layers):
            at = f"layers.{layer}."
            own = {name.removeprefix(at): value for name, value in self.tensors.items() if name.startswith(at)}
            norms = {name.removesuffix(".weight"): value for name, value in own.items() if value.ndim == 1}
            decoder.layer(layer, own | norms)
        head = self.tensors.get("head.weight", self.tensors["embed.weight"])
        return decoder.logits_at(0, slice(None), self.tensors["final_norm.weight"], head)

    def _undo_maps(self) -> None:
        """What the device does to a layer's input, in its columns."""
        for stem, form in self.formats.items():
            factor = self.tensors.pop(f"{stem}.input_factor", None)
            assert form.factor == (factor is not None) or stem in self.undone
            if factor is not None:
                self.tensors[f"{stem}.weight"] = self.tensors[f"{stem}.weight"] * factor
            if stem in self.orders:
                order = self.orders.pop(stem)
                self.tensors[f"{stem}.weight"] = self.tensors[f"{stem}.weight"][:, np.argsort(order)]
                norm = {"attn.qkv": "input_norm", "mlp.gate_up": "post_norm"}.get(stem.split(".", 2)[2])
                if norm is not None:
                    gain = self.tensors[f"layers.{stem.split('.')[1]}.{norm}.weight"]
                    assert np.array_equal(self.tensors.pop(f"{stem}.ordered_gain"), gain[order])
            self.undone.add(stem)


def save(case: str, path: Path, kind: str) -> Any:
    if case in MODELOPT:
        return test_quantized_modelopt.save(MODELOPT[case], path, kind)
    return test_quantized_formats.save(case, path, kind)


def own_heads() -> Any:
    """A llama whose heads have keys and values of their own, and biases."""
    return transformers.LlamaConfig(**tiny._COMMON | {"num_key_value_heads": 4}, attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize("case", [*test_quantized_formats.CASES, *MODELOPT])
@pytest.mark.parametrize("kind", ["qwen3", "llama_own_heads", "gemma3_scaled"])
def test_what_the_device_gets_computes_what_the_checkpoint_means(
    case: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.CONFIGS, "llama_own_heads", own_heads)
    model = save(case, tmp_path / "source", kind)
    device = Device(export_bundle(tmp_path / "source", tmp_path / "bundle"))
    assert relative_error(device.logits(PROMPT), hf_logits(model, PROMPT)) < ROUNDING


@pytest.mark.parametrize("case", ["modelopt int4_awq", "gptq by activation"])
def test_norms_on_outputs_stay_apart_from_those_that_take_a_factor(case: str, tmp_path: Path) -> None:
    model = save(case, tmp_path / "source", "gemma3_scaled")
    device = Device(export_bundle(tmp_path / "source", tmp_path / "bundle"))
    assert relative_error(device.logits(PROMPT), hf_logits(model, PROMPT)) < ROUNDING


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_a_gguf_file_computes_on_the_device_what_ggml_means(quantisation: str, tmp_path: Path) -> None:
    tiny.save_gguf("llama_tied", tmp_path / "model.gguf", quantisation)
    device = Device(export_bundle(tmp_path / "model.gguf", tmp_path / "bundle"))
    assert relative_error(device.logits(PROMPT), hf_logits(dequantised(tmp_path / "model.gguf"), PROMPT)) < ROUNDING


def test_k_quants_that_differ_from_layer_to_layer_do_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**tiny._COMMON | sizes | {"tie_word_embeddings": True})
    monkeypatch.setitem(tiny.CONFIGS, "wide", lambda: config)

    def pack(name: str, weight: np.ndarray) -> tuple[str, np.ndarray]:
        six = "v_proj" in name or "embed" in name or ("down_proj" in name and ".1." in name)
        return ("Q6_K", pack_q6_k(weight)) if six else ("Q4_K", pack_q4_k(weight))

    tiny.save_gguf("wide", tmp_path / "model.gguf", pack=pack)
    device = Device(export_bundle(tmp_path / "model.gguf", tmp_path / "bundle"))
    formats = {stem: form.format for stem, form in device.formats.items()}
    assert (formats["layers.0.mlp.down"], formats["layers.1.mlp.down"], formats["embed"]) == (
        "int8_offset",
        "int8",
        "int8",
    )
    assert relative_error(device.logits(PROMPT), hf_logits(dequantised(tmp_path / "model.gguf"), PROMPT)) < ROUNDING


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("modelopt int4_awq", "qwen3"),
        ("modelopt int4_awq", "llama_own_heads"),
        ("gptq by activation", "llama_own_heads"),
        ("gptq by activation", "qwen3"),
    ],
)
def test_an_adapter_adds_what_it_adds_to_the_checkpoints_own_layers(
    case: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.CONFIGS, "llama_own_heads", own_heads)
    model = save(case, tmp_path / "source", kind)
    bundle = export_bundle(tmp_path / "source", tmp_path / "bundle")
    device = Device(bundle)
    rng = np.random.default_rng(4)
    tensors = []
    with torch.no_grad():
        for name, module in model.named_modules():
            if not name.endswith("_proj"):
                continue
            out, width = module.weight.shape
            a = rng.normal(0, width**-0.5, (4, width)).astype(np.float32)
            b = rng.normal(0, 0.3, (out, 4)).astype(np.float32)
            module.weight += torch.from_numpy(0.5 * b @ a)
            tensors.append(LoraTensors(int(name.split(".")[2]), name.rpartition(".")[2], a, b, 0.5))
    plain = Device(bundle).logits(PROMPT)
    inputs = LayerInputs(bundle.manifest.model, bundle.manifest.quantization, bundle.weights())
    device.add(inputs.adapter(LoraAdapter(tuple(tensors), "x")))
    expected = hf_logits(model, PROMPT)
    assert relative_error(plain, expected) > 0.2, "the adapter must matter"
    assert relative_error(device.logits(PROMPT), expected) < ROUNDING
