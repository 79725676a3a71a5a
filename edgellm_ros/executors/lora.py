"""What a PEFT adapter directory holds: which projections it changes, by which matrices, and how strongly.

Read without torch. The format is that of Hugging Face PEFT: `adapter_config.json` beside `adapter_model.safetensors`,
a pair `...layers.N.self_attn.q_proj.lora_A.weight` (r, in) and `lora_B.weight` (out, r) for each changed projection,
which adds alpha / r * B A to its weight (alpha / sqrt(r) with use_rslora).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors

from edgellm_ros.errors import RequestError, UnsupportedError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # of older versions of PEFT
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")

_LARGEST = float(np.finfo(np.float32).max)
_DTYPES: dict[str, npt.DTypeLike] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# A vision tower has layers of the same names, so what may stand before `layers` is spelt out.
_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>(?:model\.|language_model\.)*layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\."
    r"(?P<target>" + "|".join(TARGETS) + r"))\.lora_(?P<part>[AB])(?:\.default)?\.weight"
)
# Keys of adapter_config.json that change what an adapter computes, and the values that mean "not used".
_UNUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # PiSSA, OLoRA, CorDA, LoftQ and MiCA begin by changing the base weights, so B A is not what they add to them.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# Keys that are read, and keys that matter to training or to PEFT alone. Any other that is set is refused: a new kind
# of adapter announces itself that way.
_KNOWN = {
    *_UNUSED, "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules",
    "base_model_name_or_path", "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    "velora_config",
}  # fmt: skip
_REMEDIES = {
    "init_lora_weights": "; convert it with PEFT: save_pretrained(path_initial_model_for_weight_conversion=…)",
    "modules_to_save": "; train without it, or merge the adapter with PEFT and export the result",
}


@dataclass(frozen=True)
class LoraTensors:
    """One projection of one layer: its weight W acts as W + scale * B A."""

    layer: int
    target: str  # one of TARGETS
    a: npt.NDArray[np.float32]  # (rank, in)
    b: npt.NDArray[np.float32]  # (out, rank)
    scale: float


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter in host memory; `fingerprint` is a hash of its files or tensors."""

    tensors: tuple[LoraTensors, ...]
    fingerprint: str
    base: str = ""  # the model it was trained on, a name or a path; empty when it does not say
    rslora: bool = False  # scales are alpha / sqrt(rank)

    @property
    def rank(self) -> int:
        """The largest rank of its projections."""
        return max((len(item.a) for item in self.tensors), default=0)


def make_adapter(tensors: tuple[LoraTensors, ...]) -> LoraAdapter:
    """An adapter of tensors that did not come from a directory."""
    digest = hashlib.sha256()
    for item in tensors:
        digest.update(repr((item.layer, item.target, item.scale, item.a.shape, item.b.shape)).encode())
        digest.update(item.a.tobytes())
        digest.update(item.b.tobytes())
    return LoraAdapter(tensors, digest.hexdigest())


def read_adapter(path: str | Path) -> LoraAdapter:
    """Read a PEFT adapter directory.

    Raises RequestError when a file is missing, damaged or contradicts the other, and UnsupportedError that names what
    of the adapter cannot be honoured (DoRA, biases, changed embeddings or heads, other projections).
    """
    root = Path(path)
    if (root / PICKLED).is_file() and not (root / WEIGHTS).exists():
        raise RequestError(
            f"{root} has only pickled weights ({PICKLED}), which are not read; convert them with PEFT: "
            "PeftModel.from_pretrained(BASE_MODEL, DIR).save_pretrained(NEW_DIR)"
        )
    try:
        config_bytes = (root / CONFIG).read_bytes()
        weight_bytes = (root / WEIGHTS).read_bytes()
    except OSError as error:
        raise RequestError(
            f"{root} is no LoRA adapter: {error}; it must be a directory with {CONFIG} and {WEIGHTS}, as PEFT saves it"
        ) from error
    config = _read_config(root / CONFIG, config_bytes)
    try:
        stored = safetensors.deserialize(weight_bytes)
    except safetensors.SafetensorError as error:
        raise RequestError(f"{root / WEIGHTS} is damaged: {error}; copy the adapter again") from error
    digest = hashlib.sha256(config_bytes)
    digest.update(weight_bytes)
    tensors = _pair(root / WEIGHTS, dict(stored), config)
    base = str(config.get("base_model_name_or_path") or "")
    return LoraAdapter(tensors, digest.hexdigest(), base, bool(config.get("use_rslora")))


def _read_config(path: Path, text: bytes) -> dict[str, Any]:
    """The configuration, of which every value that is used has its type."""
    try:
        config = json.loads(text)
        config["r"], config["lora_alpha"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read: {error!r}; it must have r and lora_alpha") from error
    _check_honoured(path, config)
    rules: tuple[tuple[str, str, Callable[[Any], bool], Any, str], ...] = (
        ("r", "rank_pattern", _is_rank, config["r"], "a whole number from 0"),
        ("lora_alpha", "alpha_pattern", _is_number, config["lora_alpha"], "a finite number"),
    )
    for name, pattern, fits, value, what in rules:
        if not fits(value):
            raise RequestError(f"{path}: {name} is {value!r}; it must be {what}")
        of_modules = config.get(pattern) or {}
        if not isinstance(of_modules, dict):
            raise RequestError(f"{path}: {pattern} is {of_modules!r}; it must map modules to values")
        for key, one in of_modules.items():
            try:
                re.compile(key)
            except re.error as error:
                raise RequestError(f"{path}: {pattern} has {key!r}, which is no pattern: {error}") from error
            if not fits(one):
                raise RequestError(f"{path}: {pattern} has {key!r}: {one!r}; it must be {what}")
    return dict(config)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _check_honoured(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UnsupportedError(f"{path}: peft_type is {kind!r}; only LORA adapters can be loaded")
    for key, unused in _UNUSED.items():
        if key in config and config[key] not in unused:
            remedy = _REMEDIES.get(key, "; merge the adapter with PEFT (merge_and_unload) and export the result")
            raise UnsupportedError(f"{path}: {key} is {config[key]!r}; adapters with it are not supported{remedy}")
    for key, value in config.items():
        if key not in _KNOWN and value:
            raise UnsupportedError(
                f"{path}: {key} is {value!r}, which this version does not know; it may change what the adapter "
                "computes. Update edgellm_ros, or remove the key if it does not"
            )
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, (list, tuple)) else ():
        if str(target).rpartition(".")[2] not in TARGETS:
            raise UnsupportedError(f"{path}: target_modules has {target!r}; supported are {', '.join(TARGETS)}")


def _pair(path: Path, stored: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]) -> tuple[LoraTensors, ...]:
    found: dict[tuple[int, str], dict[str, npt.NDArray[np.float32]]] = {}
    modules: dict[tuple[int, str], str] = {}
    for name, tensor in stored.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise UnsupportedError(
                f"{path}: {name} is not supported; an adapter may have lora_A and lora_B weights of "
                f"{', '.join(TARGETS)}"
            )
        key = int(match["layer"]), match["target"]
        if match["part"] in found.get(key, ()):
            raise RequestError(f"{path} has lora_{match['part']} of {match['module']} twice, {name} is one of them")
        modules[key] = match["module"]
        found.setdefault(key, {})[match["part"]] = _values(path, name, tensor)
    if not found:
        raise RequestError(f"{path} has no tensors; the adapter was not saved as a whole")
    tensors = []
    for key in sorted(found):
        module, parts = modules[key], found[key]
        if len(parts) != 2:
            raise RequestError(f"{path}: {module} lacks lora_{'B' if 'A' in parts else 'A'}; copy the adapter again")
        a, b = parts["A"], parts["B"]
        rank = int(_of_module(config.get("rank_pattern"), module, config["r"]))
        alpha = float(_of_module(config.get("alpha_pattern"), module, config["lora_alpha"]))
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise RequestError(
                f"{path}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, but {CONFIG} says rank {rank}"
            )
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if rank else 0.0
        if abs(scale) * float(np.abs(b).max(initial=0.0)) > _LARGEST:
            raise RequestError(f"{path}: {module} is too large: its lora_B times the scale {scale:g} is not finite")
        tensors.append(LoraTensors(*key, a, b, scale))
    return tuple(tensors)


def _values(path: Path, name: str, tensor: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    if tensor["dtype"] not in _DTYPES:
        raise UnsupportedError(f"{path}: {name} is stored as {tensor['dtype']}; read are {', '.join(_DTYPES)}")
    raw = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    values: npt.NDArray[np.float32]
    if tensor["dtype"] == "BF16":  # the upper half of a float32
        values = np.left_shift(raw, 16, dtype=np.uint32).view(np.float32)
    else:
        values = raw.astype(np.float32)
    if not np.isfinite(values).all():
        raise RequestError(f"{path}: {name} has values that are not finite; the adapter is damaged")
    return values


def _of_module(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that matches the end of a module's name, as PEFT looks it up."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
