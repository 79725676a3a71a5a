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


def asymmetric(weight: np.ndarray, group: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers from 0 (out, in), fp16 scales and zero points (out, in / group)."""
    groups = weight.reshape(len(weight), -1, group)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16)
    wide = scale.astype(np.float32)
    zero = np.rint(-low / wide).clip(0, 2**bits - 1).astype(np.int64)
    numbers = (np.rint(groups / wide[..., None]) + zero[..., None]).clip(0, 2**bits - 1).astype(np.int64)
    return numbers.reshape(weight.shape), scale, zero


def words(numbers: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Non-negative numbers packed along an axis into int32, number `order[i]` of each word at bits i * `bits`."""
    per_word = 32 // bits
    moved = np.moveaxis(numbers.astype(np.uint64), axis, -1)
    moved = moved.reshape(*moved.shape[:-1], -1, per_word)
    packed = sum(moved[..., (order or range(per_word))[i]] << np.uint64(bits * i) for i in range(per_word))
    return tensor(np.moveaxis(packed.astype(np.uint32).view(np.int32), -1, axis))


def awq(group: int) -> Callable[[str, np.ndarray], Packed | None]:
    """AutoAWQ's GEMM layout: transposed, packed along `out`, each word's columns in the kernel's order."""

    def pack(module: str, weight: np.ndarray) -> Packed | None:
        if module == "lm_head":
            return None
        numbers, scale, zero = asymmetric(weight, group, 4)
        interleaved = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {
            "qweight": words(numbers.T, 4, 1, interleaved),
            "qzeros": words(zero.T, 4, 1, interleaved),
            "scales": tensor(scale.T),
        }
        wide = (numbers.reshape(len(weight), -1, group) - zero[..., None]) * scale[..., None].astype(np.float32)
        return tensors, wide.reshape(weight.shape)

    return pack


def awq_config(group: int, **more: Any) -> dict[str, Any]:
    """As AutoAWQ writes it."""
    settings = {"bits": 4, "group_size": group, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
    return {"quant_method": "awq", **settings, **more}


def gptq(group: int, bits: int, sym: bool, order: bool = False, v2: bool = False) -> Callable[[str, np.ndarray], Packed | None]:
    """AutoGPTQ's layout; `order` gives input features to groups at random, the same for layers of one input."""

    def pack(module: str, weight: np.ndarray) -> Packed | None:
        if module == "lm_head":
            return None
        columns = weight.shape[1]
        size = columns if group == -1 else group
        index = np.arange(columns) // size
        if order:
            index = np.random.default_rng(columns).permutation(index)
        by_group = np.argsort(index, kind="stable")
        if sym:
            values, scale = symmetric(weight[:, by_group], size, 2 ** (bits - 1) - 1, np.float16)
            numbers = values.astype(np.int64) + 2 ** (bits - 1)
            zero = np.full(scale.shape, 2 ** (bits - 1), np.int64)
        else:
            numbers, scale, zero = asymmetric(weight[:, by_group], size, bits)
            zero = zero.clip(1)  # the older format cannot store 0
        wide = (numbers.reshape(len(weight), -1, size) - zero[..., None]) * scale[..., None].astype(np.float32)
        back = np.argsort(by_group)
        tensors = {
            "qweight": words(numbers[:, back].T, bits, 0),
            "qzeros": words(zero.T - (0 if v2 else 1), bits, 1),
            "scales": tensor(scale.T),
            "g_idx": tensor(index.astype(np.int32)),
        }
        return tensors, wide.reshape(weight.shape)[:, back]

    return pack


def gptq_config(group: int, bits: int, sym: bool, order: bool = False, v2: bool = False, **more: Any) -> dict[str, Any]:
    """As GPTQModel writes it."""
    settings = {"bits": bits, "group_size": group, "sym": sym, "desc_act": order, "lm_head": False}
    return {"quant_method": "gptq", **settings, **({"checkpoint_format": "gptq_v2"} if v2 else {}), **more}


def fp8_blocks(rows: int, columns: int) -> Callable[[str, np.ndarray], Packed | None]:
    """DeepSeek's and Qwen's FP8: weight_scale_inv of blocks, the last ones cut off at the edges."""

    def pack(module: str, weight: np.ndarray) -> Packed | None:
        if module == "lm_head":
            return None
        scale = np.empty((-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)), np.float32)
        meant, values = np.empty_like(weight), np.empty(weight.shape, E4M3)
        for i, j in np.ndindex(scale.shape):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = np.abs(weight[at]).max() / 448
            values[at] = (weight[at] / scale[i, j]).astype(E4M3)
            meant[at] = values[at].astype(np.float32) * scale[i, j]
        return {"weight": tensor(values), "weight_scale_inv": tensor(scale)}, meant

    return pack


def ct_packed(group: int, bits: int, symmetrical: bool) -> Callable[[str, np.ndarray], Packed | None]:
    """pack-quantized; group 0 is a scale a row."""

    def pack(module: str, weight: np.ndarray) -> Packed | None:
        if module == "lm_head":
            return None
        size, middle = group or weight.shape[1], 2 ** (bits - 1)
        if symmetrical:
            values, scale = symmetric(weight, size, middle - 1, np.float16)
            numbers, zero = values.astype(np.int64) + middle, np.full(scale.shape, middle, np.int64)
        else:
            numbers, scale, zero = asymmetric(weight, size, bits)
        tensors = {
            "weight_packed": words(numbers, bits, 1),
            "weight_scale": tensor(scale),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetrical:
            tensors["weight_zero_point"] = words(zero, bits, 0)
        wide = (numbers.reshape(len(weight), -1, size) - zero[..., None]) * scale[..., None].astype(np.float32)
        return tensors, wide.reshape(weight.shape)

    return pack


def ct_int8(module: str, weight: np.ndarray) -> Packed | None:
    """int-quantized with a scale a row."""
    if module == "lm_head":
        return None
    values, scale = symmetric(weight, weight.shape[1], 127, np.float16)
    return {"weight": tensor(values), "weight_scale": tensor(scale)}, values * spread(scale, weight.shape[1])


def ct_fp8(channel: bool) -> Callable[[str, np.ndarray], Packed | None]:
    """float-quantized with a scale a row or a tensor, in bfloat16 as llm-compressor keeps a bfloat16 model's."""

    def pack(module: str, weight: np.ndarray) -> Packed | None:
        if module == "lm_head":
            return None
        largest = np.abs(weight).max(1, keepdims=True) if channel else np.abs(weight).max(keepdims=True)[0]
        scale = torch.tensor(largest / 448).bfloat16()
        values = (weight / scale.float().numpy()).clip(-448, 448).astype(E4M3)
        return {"weight": tensor(values), "weight_scale": scale}, values.astype(np.float32) * scale.float().numpy()

    return pack


def ct_nvfp4(module: str, weight: np.ndarray) -> Packed | None:
    """nvfp4-pack-quantized: the global scale divides."""
    packed = modelopt_nvfp4(module, weight)
    if packed is None:
        return None
    tensors, meant = packed
    whole = 1 / tensors["weight_scale_2"].reshape(1)
    names = {"weight_packed": tensors["weight"], "weight_scale": tensors["weight_scale"], "weight_global_scale": whole}
    return names, meant


def ct_config(form: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}, **more}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "quantization_status": "compressed", "kv_cache_scheme": None,
    }  # fmt: skip


def with_fp8_inputs(model: Any, scales: dict[str, float]) -> Any:
    """The model with every named layer's input rounded to FP8 multiples of its scale, by torch."""

    def hook(scale: float) -> Any:
        def round_input(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return ((args[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale,)

        return round_input

    for name, module in model.named_modules():
        if name in scales:
            module.register_forward_pre_hook(hook(scales[name]))
    return model
