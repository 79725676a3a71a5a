"""Plans of the double of libnvinfer (native/nvinfer_double/plan.hpp) out of bundles, and engines' directories of them.

A plan has what TensorRT's engine would: bindings and profiles as `edgellm build` asks for them, and the weights, in the
form in which the cuda executor hands them to the same kernels. Nothing in it was made by TensorRT.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgellm_ros.bundle import Bundle, hash_file
from edgellm_ros.config import BuildOptions, EngineConfig
from edgellm_ros.executors import cuda
from edgellm_ros.executors.contract import lora_ranks
from edgellm_ros.executors.engines import (
    ENGINE,
    ENGINES,
    REPORT,
    Engine,
    activation_dtype,
    cache_format,
    engine_contract,
    read_engine,
    source_hashes,
)
from edgellm_ros.toolchain.build.profiles import profile_ranges

MAGIC = b"edgellm_ros double of nvinfer 1\n"
TENSORRT = (10, 14, 1, 48)  # whose headers the double is compiled with; the last one is not in the plan
ALIGNMENT = 256
_NUMBERS = (
    "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
    "head_rows", "num_positions", "capacity", "rms_norm_eps", "attention_scale", "qk_norm", "tied_head",
    "logit_softcap", "output_norms",
)  # fmt: skip


class _Recorder:
    """Takes what a native decoder would be given."""

    def __init__(self) -> None:
        self.tensors: dict[str, np.ndarray] = {}

    def load_vector(self, name: str, values: np.ndarray) -> None:
        self.tensors[name] = np.ascontiguousarray(values)

    def load_linear(self, stem: str, values: np.ndarray, scale: np.ndarray | None) -> None:
        self.tensors[f"{stem}.weight"] = np.ascontiguousarray(values)
        if scale is not None:
            self.tensors[f"{stem}.scale"] = np.ascontiguousarray(scale)

    def load_vocab_map(self, token_ids: np.ndarray) -> None:
        self.tensors["vocab_map"] = np.ascontiguousarray(token_ids, np.int32)


def refusal(bundle: Bundle, options: BuildOptions) -> str:
    """What of the bundle the double cannot compute; empty when it can."""
    model = bundle.manifest.model
    dtype = activation_dtype(options, bundle.manifest.graph)
    found = {
        f"activations in {dtype}": dtype not in ("float16", "bfloat16"),
        "fp8 cache of its own attention": options.kv_cache == "fp8" and options.dialect != "plugin",
        "adapters with a rope of part of a head": options.lora and bool(model.rotary_dim),
    }
    return ", ".join(name for name, needed in found.items() if needed)


def plan_facts(
    bundle: Bundle, options: BuildOptions, *, faults: dict[str, Any] | None = None, batch_invariant: bool = True
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The plan's JSON and tensors; `options` are resolved. Raises ValueError for what the double cannot compute."""
    reason = refusal(bundle, options)
    if reason:
        raise ValueError(f"the double has no {reason}")
    model, graph = bundle.manifest.model, bundle.manifest.graph
    dtype = activation_dtype(options, graph)
    contract = engine_contract(bundle.manifest, options)
    inputs = {tensor.name: tensor.sizes for tensor in contract if tensor.is_input}
    ranks = lora_ranks(model, graph) if options.lora else {}
    settings = cuda._settings(bundle, EngineConfig(max_context=options.max_context or 0, kv_cache=cache_format(options, graph)))
    if settings.ordered or settings.factored:
        raise ValueError("the double has no order or factor of a layer's input")
    recorder = _Recorder()
    cuda._upload(recorder, bundle)
    decoder = {name: getattr(settings, name) for name in _NUMBERS}
    decoder |= {"is_bf16": dtype == "bfloat16", "kv_format": settings.kv_format.name, "activation": settings.activation.name}
    decoder["formats"] = {stem: {"format": form.name, "group": group} for stem, (form, group) in settings.formats.items()}
    decoder |= {name: list(getattr(settings, name)) for name in ("sliding_windows", "layer_ropes", "biases")}
    facts = {
        "tensorrt": list(TENSORRT[:3]),
        "bindings": [
            {
                "name": t.name, "is_input": t.is_input, "dtype": t.dtype, "shape": list(t.sizes),
                "role": t.role, "layer": t.layer, "stem": t.stem, "window": t.window,
            }
            for t in contract
        ],
        "profiles": [
            {name: dict(zip(("min", "opt", "max"), shapes, strict=True)) for name, shapes in profile.items()}
            for profile in profile_ranges(inputs, contract, options, ranks)
        ],
        "decoder": decoder | {"batch_invariant": batch_invariant},
        "faults": faults or {},
    }  # fmt: skip
    return facts, recorder.tensors


def plan_bytes(facts: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    """The file's bytes."""
    table, data, offset = [], [], 0
    for name, values in tensors.items():
        entry = {"name": name, "dtype": str(values.dtype), "shape": list(values.shape), "offset": offset}
        table.append(entry)
        raw = values.tobytes()
        raw += b"\0" * (-len(raw) % ALIGNMENT)
        data.append(raw)
        offset += len(raw)
    text = json.dumps({**facts, "weights": table}).encode()
    head = MAGIC + len(text).to_bytes(8, "little") + text
    return b"".join([head, b"\0" * (-len(head) % ALIGNMENT), *data])


def write_plan(path: Path, bundle: Bundle, options: BuildOptions, **settings: Any) -> Path:
    """A plan of the double at `path`; settings as `plan_facts` takes them."""
    path.write_bytes(plan_bytes(*plan_facts(bundle, options, **settings)))
    return path


def write_double_engine(
    bundle: Bundle,
    options: BuildOptions,
    target: str,
    *,
    change: Callable[[dict[str, Any]], None] | None = None,
    spoil: Callable[[dict[str, np.ndarray]], None] | None = None,
    report: dict[str, Any] | None = None,
    **settings: Any,
) -> Engine:
    """engines/KEY of a bundle with a double's plan and the report that `edgellm build` would write.

    change: alters the plan's facts, so that they are not what the report says; spoil, its weights. report: fields that
    replace the report's. Resolves `options` itself.
    """
    options = options.resolved(bundle)
    facts, tensors = plan_facts(bundle, options, **settings)
    if spoil is not None:
        spoil(tensors)
    profiles = [
        {name: [shapes["min"], shapes["opt"], shapes["max"]] for name, shapes in profile.items()}
        for profile in facts["profiles"]
    ]
    if change is not None:
        change(facts)
    version = ".".join(map(str, TENSORRT))
    path = bundle.path / ENGINES / f"double-{target}-{len(list((bundle.path / ENGINES).glob('*')))}"
    path.mkdir(parents=True)
    (path / ENGINE).write_bytes(plan_bytes(facts, tensors))
    entry = hash_file(path / ENGINE)
    written = {
        "builder": {"name": "tensorrt", "version": version, "edgellm_ros": "a double, not TensorRT"},
        "target": target,
        "options": dataclasses.asdict(options),
        "profiles": profiles,
        "activation_memory_bytes": [1 << 20] * len(profiles),
        "engine": {"size": entry.size, "sha256": entry.sha256},
        "sources": source_hashes(bundle, options.lora, options.dialect),
        **(report or {}),
    }
    (path / REPORT).write_text(json.dumps(written), encoding="utf-8")
    return read_engine(path)
