"""A bundle for the command line's tests, served by the real LLM over the executor of `doubles`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doubles import BYTE_VOCAB, EOS, FakeExecutor, byte_tokenizer_json

from edgellm_ros.bundle import CHAT_TEMPLATE, TOKENIZER, Bundle, hash_file
from edgellm_ros.config import EngineConfig
from edgellm_ros.manifest import MANIFEST, SCHEMA_VERSION, GraphSpec, Manifest, ModelSpec, QuantSpec, TokenSpec

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}[think]{% endif %}{% endif %}"
)


def write_bundle(root: Path, **tokens: Any) -> Path:
    """A directory without weights, but whole."""
    root.mkdir()
    (root / TOKENIZER).write_text(byte_tokenizer_json(), encoding="utf-8")
    (root / CHAT_TEMPLATE).write_text(TEMPLATE, encoding="utf-8")
    model = ModelSpec("llama", "tiny [bold] robot", 2, 8, 16, 4, 1, 8, BYTE_VOCAB, 256, 1e-5, rope_theta=5e5)
    spec = TokenSpec(**{"stop_ids": (EOS,), "eos_token": "<eos>", **tokens})
    files = {p.name: hash_file(p) for p in root.iterdir()}
    provenance = {"source": "made by a test"}
    manifest = Manifest(SCHEMA_VERSION, model, spec, QuantSpec("int4", 32), GraphSpec(), provenance, files)
    (root / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return root


def serve_with_fakes(
    monkeypatch: pytest.MonkeyPatch, before_step: Callable[[Any], None] | None = None, capacity: int = 256
) -> list[FakeExecutor]:
    """Let LLM.open create FakeExecutors; returns the list that they are put into."""
    made: list[FakeExecutor] = []

    def create(bundle: Bundle, config: EngineConfig) -> FakeExecutor:
        made.append(FakeExecutor(config.max_slots, capacity, allowed=128, before_step=before_step))
        return made[-1]

    monkeypatch.setattr("edgellm_ros.executors.create_executor", create)
    return made
