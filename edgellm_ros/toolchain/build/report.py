"""Decides an engine's key and what its report says; reads the reports of a bundle's engines, without TensorRT."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm_ros.bundle import DECODER, DECODER_LORA, WEIGHTS, Bundle, hash_file
from edgellm_ros.errors import ToolchainError
from edgellm_ros.config import BuildOptions

ENGINES, ENGINE, REPORT, LAYERS = "engines", "decoder.engine", "report.json", "layers.json"


@dataclass(frozen=True)
class Engine:
    """A built engine: its directory and its report."""

    path: Path
    report: dict[str, Any]

    @property
    def key(self) -> str:
        """Name of the directory below engines/."""
        return self.path.name


def engine_key(builder: str, version: str, target: str, options: BuildOptions) -> str:
    """Flavour, version, architecture and options, as a directory's name."""
    parts = [builder, version, target, f"b{options.max_batch}", f"s{options.max_input}", f"c{options.max_context}"]
    parts += [f"v{options.max_verify}", options.profile]
    parts += ["lora"] if options.lora else []
    parts += ["bf16"] if options.activations == "bf16" else []
    return "-".join(parts + ([f"m{options.memory_limit}"] if options.memory_limit else []))


def graph_file(lora: bool) -> str:
    """The decoder that an engine with or without adapters is made from."""
    return DECODER_LORA if lora else DECODER


def source_hashes(bundle: Bundle, lora: bool) -> dict[str, str]:
    """sha256 of the files that an engine is made from; empty for one that the bundle lacks."""
    files = bundle.manifest.files
    return {name: files[name].sha256 if name in files else "" for name in (graph_file(lora), WEIGHTS)}


def is_of(engine: Engine, bundle: Bundle) -> bool:
    """Whether an engine was built from the bundle's files as they are."""
    options = engine.report.get("options")
    lora = bool(options.get("lora")) if isinstance(options, dict) else False
    return bool(engine.report.get("sources") == source_hashes(bundle, lora))


def layer_table(rows: list[list[str]]) -> str:
    """The text of layers.json: name, kind and outputs of every layer of the parsed network, a line each."""
    lines = ",\n".join(json.dumps(dict(zip(("name", "kind", "outputs"), row, strict=True))) for row in rows)
    return f"[\n{lines}\n]\n"


def read_engine(path: Path) -> Engine:
    """The engine in `path`; raises ToolchainError when its report or its file is missing or damaged."""
    remedy = "build it again with --force"
    try:
        report = json.loads((path / REPORT).read_text(encoding="utf-8"))
        size = (path / ENGINE).stat().st_size
        if size != report["engine"]["size"]:
            raise ToolchainError(f"{path / ENGINE} has {size} bytes instead of {report['engine']['size']}; {remedy}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ToolchainError(f"{path} is not a whole engine ({error}); {remedy}") from error
    return Engine(path, report)


def check_engine(engine: Engine, bundle: Bundle) -> None:
    """Raise ToolchainError unless the engine is unchanged and was built from this bundle's files."""
    if not is_of(engine, bundle):
        raise ToolchainError(
            f"{engine.path} was built from other weights or another graph; build it again with --force"
        )
    if hash_file(engine.path / ENGINE).sha256 != engine.report["engine"]["sha256"]:
        raise ToolchainError(f"{engine.path / ENGINE} was changed; build it again with --force")


def list_engines(bundle: Bundle) -> list[Path]:
    """Directories of the bundle's engines, by name."""
    root = bundle.path / ENGINES
    return sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != ".") if root.is_dir() else []
