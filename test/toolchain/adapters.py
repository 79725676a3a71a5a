"""Random PEFT adapters, and what they make of a model by the formula of the LoRA paper (arXiv:2106.09685)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm_ros.executors import Executor, SequenceStep
from edgellm_ros.executors.lora import CONFIG, WEIGHTS

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
ALL = (*ATTENTION, *MLP)
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")  # Phi-3's
PATTERN = {"q_proj": 3, "v_proj": 16, "layers.1.mlp.down_proj": 5}  # PEFT's rank_pattern


def projection(model: Any, layer: int, target: str) -> Any:
    block = model.model.layers[layer]
    return getattr(block.self_attn if hasattr(block.self_attn, target) else block.mlp, target)


def write_adapter(path: Path, model: Any, ranks: dict[str, int], seed: int, rslora: bool = False, base: str = "") -> Path:
    """A PEFT directory with random matrices that change each projection about half as much as it is."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(len(model.model.layers)):
        for target, rank in ranks.items():
            weight = projection(model, layer, target).weight
            rows, cols = weight.shape
            scale = 8 / (rank**0.5 if rslora else rank)
            size = 0.5 * float(weight.detach().norm()) / (rows * rank * cols) ** 0.5 / scale
            block = "mlp" if hasattr(model.model.layers[layer].mlp, target) else "self_attn"
            at = f"base_model.model.model.layers.{layer}.{block}.{target}"
            a, b = torch.randn((rank, cols), generator=generator), torch.randn((rows, rank), generator=generator)
            tensors[f"{at}.lora_A.weight"], tensors[f"{at}.lora_B.weight"] = a, b * size
    path.mkdir()
    save_file(tensors, path / WEIGHTS)
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 8, "use_rslora": rslora, "rank_pattern": ranks,
        "target_modules": list(ranks), "base_model_name_or_path": base,
    }  # fmt: skip
    (path / CONFIG).write_text(json.dumps(config))
    return path


def merged(model: Any, path: Path) -> Any:
    """A copy of `model` whose weights have the adapter in `path` added, by the formula of the LoRA paper."""
    import torch
    from safetensors.torch import load_file

    config, tensors = json.loads((path / CONFIG).read_text()), load_file(path / WEIGHTS)
    out = copy.deepcopy(model)
    with torch.no_grad():
        for name, a in tensors.items():
            if not name.endswith("lora_A.weight"):
                continue
            parts = name.split(".")
            rank = a.shape[0]
            scale = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
            b = tensors[name.replace("lora_A", "lora_B")]
            projection(out, int(parts[4]), parts[6]).weight += scale * b @ a
    return out


def peft_adapter(path: Path, checkpoint: Path, seed: int = 0, dtype: Any = None, **config: Any) -> Any:
    """Save a random adapter with PEFT itself; returns the PEFT model."""
    peft = pytest.importorskip("peft", reason="peft is not installed; make test installs it")
    import torch
    import transformers

    torch.manual_seed(seed)
    kind = {"dtype": dtype or torch.float32, "attn_implementation": "eager"}
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, **kind).eval()
    settings = {"r": 4, "lora_alpha": 16, "target_modules": list(ALL), "init_lora_weights": False, **config}
    model = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    model.save_pretrained(path)
    return model


def step(slot: int, ids: Any, position: int, num_logits: int = 1, adapter: int = 0) -> SequenceStep:
    return SequenceStep(slot, np.asarray(ids, np.int32), position, num_logits, adapter)


def check_each_has_its_own_adapter(executor: Executor, adapters: list[int], prompts: list[np.ndarray]) -> None:
    """Sequences with these adapters get the bits together, in any place of a batch, that each gets alone."""
    slots = range(len(adapters))

    def fill() -> None:
        for slot in slots:
            executor.step([step(slot, prompts[slot], 0, 1, adapters[slot])])

    def single(slot: int, i: int) -> SequenceStep:
        return step(slot, [9 + i], len(prompts[slot]) + i, 1, adapters[slot])

    fill()
    alone = [[executor.step([single(slot, i)])[0].copy() for i in range(3)] for slot in slots]
    fill()
    for i in range(3):
        order = np.roll(np.arange(len(adapters)), i)
        rows = executor.step([single(int(slot), i) for slot in order])
        for row, slot in zip(rows, order, strict=True):
            assert np.array_equal(row, alone[slot][i]), (slot, i)
