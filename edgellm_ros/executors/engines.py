"""The engines of a bundle: where they are, what their reports say, and whether one belongs to this bundle.

`edgellm build` writes `engines/KEY/decoder.engine` and `report.json`; nothing here needs TensorRT.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm_ros.bundle import DECODER, DECODER_LORA, DECODER_PLUGIN, DECODER_PLUGIN_LORA, WEIGHTS, Bundle, hash_file
from edgellm_ros.config import BuildOptions, needed_activations
from edgellm_ros.errors import BundleError, ToolchainError
from edgellm_ros.executors.contract import TensorContract, decoder_contract
from edgellm_ros.fields import settings_of
from edgellm_ros.manifest import GraphSpec, Manifest

CACHE_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}  # as the setting kv_cache has them
ENGINES, ENGINE, REPORT, LAYERS = "engines", "decoder.engine", "report.json", "layers.json"
_REMEDY = "build it again with --force"


@dataclass(frozen=True)
class Engine:
    """A built engine: its directory and its report."""

    path: Path
    report: dict[str, Any]

    @property
    def key(self) -> str:
        """Name of the directory below engines/."""
        return self.path.name

    @property
    def file(self) -> Path:
        """The plan that TensorRT loads."""
        return self.path / ENGINE

    @property
    def size(self) -> int:
        """Bytes of that file; about what its weights take on the GPU."""
        return int(self.report["engine"]["size"])

    @property
    def context_bytes(self) -> int:
        """Scratch memory of the profile that needs most, as the builder logged it; 0 where it did not."""
        return max([0, *(int(size) for size in self.report.get("activation_memory_bytes") or ())])

    @property
    def builder(self) -> str:
        """Which builder made it: tensorrt or tensorrt_rtx."""
        return str(self.report["builder"]["name"])

    @property
    def version(self) -> str:
        """The builder's, such as 10.13.3.9."""
        return str(self.report["builder"]["version"])

    @property
    def target(self) -> str:
        """The GPU architecture, such as sm87."""
        return str(self.report["target"])

    @property
    def options(self) -> BuildOptions:
        """What it was built for, resolved."""
        return BuildOptions(**self.report["options"])

    @property
    def profiles(self) -> list[dict[str, list[tuple[int, ...]]]]:
        """Smallest, best and largest shape of every input, in each profile."""
        return [
            {name: [tuple(shape) for shape in shapes] for name, shapes in profile.items()}
            for profile in self.report["profiles"]
        ]


def activation_dtype(options: BuildOptions, graph: GraphSpec) -> str:
    """The dtype of an engine's embeddings, cache and adapters."""
    return "bfloat16" if options.activations == "bf16" else graph.activation_dtype


def cache_dtype(options: BuildOptions, graph: GraphSpec) -> str:
    """The dtype of an engine's cache; int8 stands for bytes of E4M3, which GPUs before compute capability 8.9 lack."""
    return "int8" if options.kv_cache == "fp8" else activation_dtype(options, graph)


def cache_format(options: BuildOptions, graph: GraphSpec) -> str:
    """The same as the setting kv_cache has it."""
    return "fp8" if options.kv_cache == "fp8" else CACHE_DTYPES[activation_dtype(options, graph)]


def engine_contract(manifest: Manifest, options: BuildOptions) -> tuple[TensorContract, ...]:
    """Every input and output of an engine that is built with these options, which are resolved."""
    return decoder_contract(
        manifest.model, manifest.graph, lora=options.lora, capacity=options.max_context or 0,
        activations=activation_dtype(options, manifest.graph), dialect=options.dialect, trees=options.trees,
        cache_dtype=cache_dtype(options, manifest.graph),
    )  # fmt: skip


def graph_file(lora: bool, dialect: str = "standard") -> str:
    """The decoder that an engine with or without adapters is made from."""
    if dialect == "plugin":
        return DECODER_PLUGIN_LORA if lora else DECODER_PLUGIN
    return DECODER_LORA if lora else DECODER


def source_hashes(bundle: Bundle, lora: bool, dialect: str = "standard") -> dict[str, str]:
    """sha256 of the files that an engine is made from; empty for one that the bundle lacks."""
    files = bundle.manifest.files
    return {name: files[name].sha256 if name in files else "" for name in (graph_file(lora, dialect), WEIGHTS)}


def is_of(engine: Engine, bundle: Bundle) -> bool:
    """Whether an engine was built from the bundle's files as they are."""
    options = engine.report.get("options")
    known = options if isinstance(options, dict) else {}
    wanted = source_hashes(bundle, bool(known.get("lora")), str(known.get("dialect", "standard")))
    return bool(engine.report.get("sources") == wanted)


def read_engine(path: Path) -> Engine:
    """The engine in `path`; raises BundleError when its report or its file is missing or damaged."""
    try:
        engine = Engine(path, json.loads((path / REPORT).read_text(encoding="utf-8")))
        size = engine.file.stat().st_size
        if size != engine.size:
            raise BundleError(f"{engine.file} has {size} bytes instead of {engine.size}; {_REMEDY}")
        # Whatever is read later is there: a report without it is damaged.
        _ = (engine.builder, engine.version, engine.target, engine.profiles, engine.context_bytes)
        if engine.options.max_context is None:
            raise ValueError("its report's options have no max_context")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, ToolchainError) as error:
        raise BundleError(f"{path} is not a whole engine ({error}); {_REMEDY}") from error
    return engine


def check_engine(engine: Engine, bundle: Bundle) -> None:
    """Raise BundleError unless the engine is unchanged and was built from this bundle's files."""
    if not is_of(engine, bundle):
        raise BundleError(f"{engine.path} was built from other weights or another graph; {_REMEDY}")
    try:
        found = hash_file(engine.file).sha256
    except OSError as error:
        raise BundleError(f"{engine.file} cannot be read ({error}); let this user read it") from error
    if found != engine.report["engine"].get("sha256"):
        raise BundleError(f"{engine.file} was changed; {_REMEDY}")


def list_engines(bundle: Bundle) -> list[Path]:
    """Directories of the bundle's engines, by name; raises BundleError where they may not be read."""
    root = bundle.path / ENGINES
    try:
        return sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != ".") if root.is_dir() else []
    except OSError as error:
        raise BundleError(f"{root} cannot be read ({error}); let this user read it, and all that is in it") from error


def build_command(bundle: Bundle, options: BuildOptions, **changed: Any) -> str:
    """The `edgellm build` that makes an engine of these options, which are resolved, with some of them changed."""
    wanted = dataclasses.replace(options, **changed)
    usual = dataclasses.replace(BuildOptions(), activations=needed_activations(bundle), dialect="standard")
    parts = ["edgellm build", str(bundle.path)]
    for item in settings_of(BuildOptions):
        value = getattr(wanted, item.name)
        if value not in ("auto", getattr(usual, item.name)):
            option = f"--{item.name.replace('_', '-')}"
            parts.append(option if value is True else f"{option} {value}")
    return " ".join(parts)
