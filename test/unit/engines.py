"""Engine directories with a report and no TensorRT behind them: what preflight reads, for tests of its decisions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from edgellm_ros.bundle import DECODER, WEIGHTS, Bundle, hash_file
from edgellm_ros.config import BuildOptions
from edgellm_ros.executors.contract import lora_ranks
from edgellm_ros.executors.engine_preflight import Binding, Machine
from edgellm_ros.executors.engines import ENGINE, ENGINES, REPORT, Engine, engine_contract, read_engine, source_hashes
from edgellm_ros.manifest import SCHEMA_VERSION, FileEntry, GraphSpec, Manifest, ModelSpec, QuantSpec, TokenSpec

MODEL = ModelSpec("llama", "tiny", 2, 64, 96, 4, 2, 16, 320, 256, 1e-5)
GRAPH = GraphSpec(activation_dtype="float16", max_lora_rank=8)
OPTIONS = BuildOptions(max_input=32, max_context=64, max_batch=2, activations="fp16")
ORIN = Machine("", "libnvinfer.so.10", (10, 13, 3, 9), "Orin", (8, 7), 4 << 30)


def make_bundle(root: Path, model: ModelSpec = MODEL, graph: GraphSpec = GRAPH) -> Bundle:
    """A bundle of a manifest alone, with hashes for the files that an engine is made from."""
    root.mkdir(parents=True, exist_ok=True)
    files = {name: FileEntry(100, str(i) * 64) for i, name in enumerate((DECODER, "decoder.lora.onnx", WEIGHTS))}
    return Bundle(root, Manifest(SCHEMA_VERSION, model, TokenSpec(), QuantSpec("int4", 32), graph, {}, files))


def ranges(bundle: Bundle, options: BuildOptions) -> list[dict[str, Any]]:
    """What the build writes as profiles: decode, and prefill where they are split."""
    contract = engine_contract(bundle.manifest, options)
    ranks = lora_ranks(bundle.manifest.model, bundle.manifest.graph)
    profiles = []
    for longest in (options.max_verify, options.max_input)[options.profile == "single" :]:
        profile = {}
        for tensor in contract:
            if not tensor.is_input:
                continue
            most = {"batch": options.max_batch, "sequence": longest, "num_logits": options.max_batch * options.max_verify}
            largest = [size if isinstance(size, int) else most.get(size, ranks.get(tensor.name, 0)) for size in tensor.shape]
            least = [size if isinstance(size, int) else int(size in most) for size in tensor.shape]
            profile[tensor.name] = [least, least if tensor.role == "positions" else largest, largest]
        profiles.append(profile)
    return profiles


def write_engine(bundle: Bundle, key: str = "tensorrt-10.13.3.9-sm87", options: BuildOptions = OPTIONS, **changed: Any) -> Engine:
    """An engine's directory; `changed` are fields of its report."""
    path = bundle.path / ENGINES / key
    path.mkdir(parents=True)
    (path / ENGINE).write_bytes(b"a plan that no library reads")
    entry = hash_file(path / ENGINE)
    report = {
        "builder": {"name": "tensorrt", "version": "10.13.3.9", "edgellm_ros": "0"},
        "target": "sm87",
        "options": dataclasses.asdict(options),
        "profiles": ranges(bundle, options),
        "activation_memory_bytes": [1 << 20, 2 << 20],
        "engine": {"size": entry.size, "sha256": entry.sha256},
        "sources": source_hashes(bundle, options.lora, options.dialect),
        **changed,
    }
    (path / REPORT).write_text(json.dumps(report), encoding="utf-8")
    return read_engine(path)


def bindings_of(engine: Engine, bundle: Bundle) -> list[Binding]:
    """What TensorRT would say of an engine that is as its report says."""
    contract = engine_contract(bundle.manifest, engine.options)
    return [
        Binding(t.name, t.is_input, t.dtype, t.sizes, False, True, [p[t.name] for p in engine.profiles] if t.is_input else [])
        for t in contract
    ]
