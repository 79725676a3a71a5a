"""Reads ModelOpt's unified checkpoints back into plain fp32 tensors, by the format's description and NumPy alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from safetensors.torch import load_file


def quantization(path: Path) -> dict[str, Any]:
    """hf_quant_config.json's `quantization`."""
    return json.loads((path / "hf_quant_config.json").read_text(encoding="utf-8"))["quantization"]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors as they are stored."""
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """Every weight in fp32, [out, in]; a pre_quant_scale, which multiplies the input, is multiplied into it."""
    stored = tensors(path)
    found: dict[str, np.ndarray] = {}
    for name, value in stored.items():
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            continue
        scale = stored.get(f"{module}.weight_scale")
        if kind == "bias" or scale is None:
            found[name] = value.float().numpy()
            continue
        scale_2 = stored.get(f"{module}.weight_scale_2")
        weight = _weight(value, scale, scale_2)
        factor = stored.get(f"{module}.pre_quant_scale")
        found[name] = weight if factor is None else weight * factor.float().numpy()
    return found


def model_of(path: Path) -> Any:
    """A transformers model (fp32, eager attention) that computes with the dequantised weights."""
    config = transformers.AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {name: torch.from_numpy(np.array(value)) for name, value in dequantized(path).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    assert not unexpected, unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set()), missing
    return model


def _weight(value: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor | None) -> np.ndarray:
    if value.dtype == torch.float8_e4m3fn:
        return (value.float() * scale.float().reshape(-1, 1)).numpy()
    if value.dtype == torch.int8:
        return value.float().numpy() * scale.float().numpy().reshape(-1, 1)
    packed = value.numpy()
    if scale.dtype == torch.float8_e4m3fn:  # NVFP4: two input features a byte, the even one low
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
        table = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        blocks = scale.float().numpy() * float(scale_2)
        return table[codes] * np.repeat(blocks, codes.shape[1] // blocks.shape[1], 1)
    codes = np.stack([packed & 15, packed >> 4], 1).reshape(2 * len(packed), -1).astype(np.int32)  # two rows a byte
    codes = np.where(codes > 7, codes - 16, codes).astype(np.float32)
    blocks = scale.float().numpy()
    return codes * np.repeat(blocks, codes.shape[1] // blocks.shape[1], 1)
