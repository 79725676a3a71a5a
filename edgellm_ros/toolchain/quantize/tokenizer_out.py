"""Which tokenizer files lie beside quantised weights: the provider's own, or what a GGUF file's metadata says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from edgellm_ros.toolchain.checkpoint import Checkpoint
from edgellm_ros.toolchain.tokenizer_files import TOKENIZER_FILES, vocabulary

_FILES = (*TOKENIZER_FILES, "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


def write_tokenizer(checkpoint: Checkpoint, output: Path) -> None:
    """Copy or write tokenizer, chat template and generation settings, so that they read as the checkpoint's do."""
    if checkpoint.kind == "safetensors":
        for name in _FILES:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, output / name)
        return
    spec, tokenizer_json = checkpoint.token_spec(), checkpoint.tokenizer_json()
    (output / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    template = checkpoint.chat_template()
    if template:
        (output / "chat_template.jinja").write_text(template, encoding="utf-8")
    texts: dict[int | None, str] = {index: text for text, index in vocabulary(json.loads(tokenizer_json)).items()}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": spec.bos_token or texts.get(spec.bos_id),
        "eos_token": spec.eos_token or texts.get(next(iter(spec.stop_ids), -1)),
        "pad_token": texts.get(spec.pad_id),
        "add_bos_token": spec.add_bos,
    }
    known = {key: value for key, value in settings.items() if value is not None}
    (output / "tokenizer_config.json").write_text(json.dumps(known, indent=2), encoding="utf-8")
    generation: dict[str, Any] = {"bos_token_id": spec.bos_id, "pad_token_id": spec.pad_id}
    generation["eos_token_id"] = list(spec.stop_ids)
    known = {key: value for key, value in generation.items() if value not in (None, [])}
    (output / "generation_config.json").write_text(json.dumps(known, indent=2), encoding="utf-8")
