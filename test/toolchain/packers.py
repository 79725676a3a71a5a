"""Tiny checkpoints as quantisation tools write them, packed here in NumPy from the formats' own descriptions.

Each packer takes a weight (out, in) and returns the tensors that stand for it, by the name after the module's, and the
weight that they mean. Nothing here is the package's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file
from tiny import make_model, save_tokenizer

Tensors = dict[str, torch.Tensor]
Packed = tuple[Tensors, np.ndarray]
E4M3 = ml_dtypes.float8_e4m3fn
E2M1 = ml_dtypes.float4_e2m1fn


def save_quantized(
    kind: str,
    path: Path,
    pack: Callable[[str, np.ndarray], Packed | None],
    config: dict[str, Any],
    files: dict[str, Any] | None = None,
) -> Any:
    """Write `make_model(kind)` with `pack`ed linear layers, and return it with the weights that they stand for.

    pack(module, weight) gives None for what stays as it is; `files` are JSON files beside config.json.
    """
    model = make_model(kind)
    tensors: Tensors = {}
    tied = model.config.tie_word_embeddings
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = name.removesuffix(".weight")
            if module in linears and not (tied and module == "lm_head"):
                packed = pack(module, parameter.numpy().copy())
                if packed is not None:
                    tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in packed[0].items()}
                    parameter.copy_(torch.from_numpy(np.ascontiguousarray(packed[1], np.float32)))
                    continue
            half = parameter.to(torch.float16)  # as most checkpoints have what is not quantised
            parameter.copy_(half)
            tensors[name] = half.clone()
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    raw = json.loads(model.config.to_json_string())
    (path / "config.json").write_text(json.dumps(raw | ({"quantization_config": config} if config else {})))
    for name, content in (files or {}).items():
        (path / name).write_text(json.dumps(content))
    save_tokenizer(path)
    return model


def tensor(array: np.ndarray) -> torch.Tensor:
    """A torch tensor of the same bytes, FP8 included."""
    if array.dtype == E4M3:
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(np.array(array, order="C"))


def symmetric(weight: np.ndarray, group: int, largest: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rounded integers (out, in) and scales (out, in / group) of the stored dtype."""
    groups = weight.reshape(len(weight), -1, group)
    scale = (np.abs(groups).max(-1) / largest).astype(dtype)
    values = np.rint(groups / scale[..., None].astype(np.float32)).clip(-largest - 1, largest)
    return values.reshape(weight.shape).astype(np.int8), scale


def spread(scale: np.ndarray, group: int) -> np.ndarray:
    """(out, in / group) to (out, in) fp32."""
    return np.repeat(scale.astype(np.float32), group, 1)


def pre_quant_scale(width: int, seed: int = 3) -> np.ndarray:
    """A factor of the input, as AWQ and SmoothQuant make."""
    return np.exp(np.random.default_rng(seed).normal(0, 0.3, width)).astype(np.float16)


def modelopt_int4(group: int, factor: bool = False, two: bool = False) -> Callable[[str, np.ndarray], Packed | None]:
    """W4A16_AWQ and (`two`) W4A8_AWQ: two rows a byte."""

    def pack(module: str, weight: np.ndarray) -> Packed | None:
        if module == "lm_head":
            return None
        pre = pre_quant_scale(weight.shape[1]) if factor else None
        smooth = weight if pre is None else weight / pre.astype(np.float32)
        values, scale = symmetric(smooth, group, 7, np.float16)
        rows, columns = weight.shape
        pairs = values.T.reshape(columns, rows // 2, 2).astype(np.uint8) & 15  # as pack_int4_in_uint8 walks
        tensors = {"weight": tensor((pairs[..., 0] | pairs[..., 1] << 4).T), "weight_scale": tensor(scale)}
        if two:
            tensors |= {"weight_scale_2": torch.tensor(0.01), "input_scale": torch.tensor(0.02)}
        meant = values * spread(scale, group)
        if pre is not None:
            tensors["pre_quant_scale"] = tensor(pre)
            meant = meant * pre.astype(np.float32)
        return tensors, meant

    return pack


def modelopt_fp8(module: str, weight: np.ndarray) -> Packed | None:
    """FP8 with one scale a tensor."""
    if module == "lm_head":
        return None
    scale = np.float32(np.abs(weight).max() / 448)
    values = (weight / scale).astype(E4M3)
    tensors = {"weight": tensor(values), "weight_scale": torch.tensor(scale), "input_scale": torch.tensor(0.05)}
    if "k_proj" in module:
        tensors["k_scale"] = torch.tensor(0.5)
    return tensors, values.astype(np.float32) * scale


def modelopt_fp8_blocks(module: str, weight: np.ndarray) -> Packed | None:
    """FP8_PB_WO: scales of 128 x 128 blocks, (out / 128, 1, in / 128, 1)."""
    if module == "lm_head":
        return None
    rows, columns = weight.shape
    scale = np.random.default_rng(0).uniform(0.001, 0.002, (-(-rows // 128), 1, columns // 128, 1)).astype(np.float32)
    whole = scale[:, 0, :, 0].repeat(128, 0)[:rows].repeat(128, 1)
    values = (weight / whole).astype(E4M3)
    return {"weight": tensor(values), "weight_scale": tensor(scale)}, values.astype(np.float32) * whole


def modelopt_int8(factor: bool) -> Callable[[str, np.ndarray], Packed | None]:
    """W8A8_SQ_PER_CHANNEL and W8A16: one scale a row."""

    def pack(module: str, weight: np.ndarray) -> Packed | None:
        if module == "lm_head":
            return None
        pre = pre_quant_scale(weight.shape[1]) if factor else np.ones(weight.shape[1], np.float16)
        values, scale = symmetric(weight / pre.astype(np.float32), weight.shape[1], 127, np.float32)
        tensors = {"weight": tensor(values), "weight_scale": tensor(scale[:, 0])}
        if factor:
            tensors |= {"pre_quant_scale": tensor(pre), "input_scale": torch.tensor(0.03)}
        return tensors, values * spread(scale, weight.shape[1]) * pre.astype(np.float32)

    return pack


def modelopt_nvfp4(module: str, weight: np.ndarray) -> Packed | None:
    """NVFP4: E2M1, E4M3 scales of 16 input features, one scale a tensor."""
    if module == "lm_head":
        return None
    groups = weight.reshape(len(weight), -1, 16)
    whole = np.float32(np.abs(weight).max() / (6 * 448))
    scale = (np.abs(groups).max(-1) / 6 / whole).astype(E4M3)
    wide = scale.astype(np.float32)[..., None] * whole
    values = (groups / np.maximum(wide, 1e-12)).clip(-6, 6).astype(E2M1).reshape(weight.shape)
    codes = values.view(np.uint8) & 15
    tensors = {
        "weight": tensor(codes[:, 0::2] | codes[:, 1::2] << 4),
        "weight_scale": tensor(scale),
        "weight_scale_2": torch.tensor(whole),
    }
    return tensors, (values.astype(np.float32).reshape(groups.shape) * wide).reshape(weight.shape)


def modelopt_files(algorithm: str, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """quantization_config of config.json, and the files beside it."""
    details = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"], **more}
    own = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": details["exclude_modules"]}
    producer = {"name": "modelopt", "version": "0.47.0"}
    return own, {"hf_quant_config.json": {"producer": producer, "quantization": details}}
