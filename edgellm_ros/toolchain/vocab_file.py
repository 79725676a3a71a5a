"""A vocabulary map on disk, as JSON or safetensors, and whether it belongs to a checkpoint.

The safetensors form has one int32 tensor `vocab_map`, ascending token ids, as TensorRT-Edge-LLM's tools write it; it
is also what a bundle holds. JSON is for people: `{"vocab_size": 49152, "token_ids": [0, 1, …]}`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from edgellm_ros.bundle import VOCAB_MAP
from edgellm_ros.errors import ToolchainError
from edgellm_ros.manifest import ModelSpec
from edgellm_ros.toolchain.checkpoint import Checkpoint
from edgellm_ros.toolchain.required_tokens import required_tokens
from edgellm_ros.toolchain.whole_output import system_errors, why_not_writable
from edgellm_ros.vocab_map import VocabMap

_FORMATS = (".json", ".safetensors")
_TENSOR = VOCAB_MAP.partition(".")[0]


@dataclass(frozen=True)
class VocabFile:
    """What a file says. `vocab_size` 0 and an empty `tokenizer_sha256`: it does not say which model it is of."""

    token_ids: tuple[int, ...]
    vocab_size: int = 0
    tokenizer_sha256: str = ""


def tokenizer_hash(tokenizer_json: str) -> str:
    """sha256 of a tokenizer.json's text."""
    return hashlib.sha256(tokenizer_json.encode()).hexdigest()


def check_format(path: Path) -> None:
    """Raise ToolchainError for a name that tells no format."""
    if path.suffix not in _FORMATS:
        raise ToolchainError(f"{path} must end in {' or '.join(_FORMATS)}: that is the map's format")


def check_output(path: Path) -> None:
    """Raise ToolchainError for a name that no map can be written to."""
    check_format(path)
    if path.is_dir():
        raise ToolchainError(f"{path} is a directory; name a file in it")
    if why := why_not_writable(path.parent):
        raise ToolchainError(f"{path} cannot be written ({why}); name another file")


def write_vocab_file(path: Path, vocab: VocabMap, tokenizer_sha256: str) -> None:
    """Write `vocab` to `path`, whose suffix is the format; the file is whole or not there."""
    check_format(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    about = {"vocab_size": vocab.vocab_size, "tokenizer_sha256": tokenizer_sha256}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            partial.write_text(json.dumps({**about, "token_ids": vocab.token_ids.tolist()}) + "\n", encoding="utf-8")
        else:
            metadata = {key: str(value) for key, value in about.items()}
            with system_errors():
                safetensors.numpy.save_file({_TENSOR: vocab.token_ids}, partial, metadata)
        partial.rename(path)
    except OSError as error:
        raise ToolchainError(f"cannot write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def read_vocab_file(path: Path) -> VocabFile:
    """Read a map; raises ToolchainError that says what is wrong with the file."""
    check_format(path)
    try:
        if path.suffix == ".json":
            return _from_json(json.loads(path.read_text(encoding="utf-8")))
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            ids = file.get_tensor(_TENSOR)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"{_TENSOR} is {ids.dtype} of shape {ids.shape}; it must be a list of whole numbers")
        size = int(metadata.get("vocab_size", "0"))
        return VocabFile(tuple(ids.tolist()), size, metadata.get("tokenizer_sha256", ""))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ToolchainError(f"{path} is no vocabulary map: {error}; `edgellm reduce-vocab` writes one") from error


def _from_json(raw: object) -> VocabFile:
    if not isinstance(raw, dict) or not isinstance(raw.get("token_ids"), list):
        raise ValueError("it has no list token_ids")
    ids, size, digest = raw["token_ids"], raw.get("vocab_size", 0), raw.get("tokenizer_sha256", "")
    wrong = [value for value in (*ids, size) if type(value) is not int]
    if wrong or not isinstance(digest, str):
        raise ValueError(f"it has {(wrong or [digest])[0]!r} where a whole number or a hash belongs")
    return VocabFile(tuple(ids), size, digest)


def load_vocab_map(path: Path, source: Checkpoint, model: ModelSpec) -> VocabMap:
    """The map at `path` for a checkpoint.

    Raises ToolchainError when it was made for another model, lacks a token that must stay, or cuts nothing.
    """
    found, text, size = read_vocab_file(path), source.tokenizer_json(), model.vocab_size
    remedy = "make a map of this checkpoint with edgellm reduce-vocab"
    if found.vocab_size not in (0, size):
        raise ToolchainError(f"{path} is for a vocabulary of {found.vocab_size} tokens, the model has {size}; {remedy}")
    if found.tokenizer_sha256 not in ("", tokenizer_hash(text)):
        raise ToolchainError(f"{path} is for another tokenizer.json than the checkpoint's; {remedy}")
    try:
        vocab = VocabMap(np.asarray(found.token_ids), size)
    except ValueError as error:
        raise ToolchainError(f"{path}: {error}; {remedy}") from error
    if len(vocab) == size:
        raise ToolchainError(f"{path} keeps all {size} tokens, so it cuts nothing; export without it")
    required = required_tokens(text, source.token_spec(), source.chat_template(), size)
    missing = sorted({token for ids in required.values() for token in ids if token not in vocab})
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        raise ToolchainError(
            f"{path} lacks {len(missing)} tokens that must stay (special tokens, bytes, digits, the chat template's): "
            f"{shown}; add them with edgellm reduce-vocab CHECKPOINT --tokens {path} -o NEW"
        )
    return vocab
