"""Decides an engine's key and the text of its layer table; reading reports is executors/engines.py's."""

from __future__ import annotations

import json

from edgellm_ros.config import BuildOptions


def engine_key(builder: str, version: str, target: str, options: BuildOptions) -> str:
    """Flavour, version, architecture and options, as a directory's name."""
    parts = [builder, version, target, f"b{options.max_batch}", f"s{options.max_input}", f"c{options.max_context}"]
    parts += [f"v{options.max_verify}", options.profile]
    parts += ["lora"] if options.lora else []
    parts += ["trees"] if options.trees else []
    parts += ["plugin"] if options.dialect == "plugin" else []
    parts += [f"kv_{options.kv_cache}"] if options.kv_cache != "auto" else []
    parts += ["bf16"] if options.activations == "bf16" else []
    return "-".join(parts + ([f"m{options.memory_limit}"] if options.memory_limit else []))


def layer_table(rows: list[list[str]]) -> str:
    """The text of layers.json: name, kind and outputs of every layer of the parsed network, a line each."""
    lines = ",\n".join(json.dumps(dict(zip(("name", "kind", "outputs"), row, strict=True))) for row in rows)
    return f"[\n{lines}\n]\n"
