"""How often each token of a model occurs in some text files; memory does not grow with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from edgellm_ros.errors import ToolchainError
from edgellm_ros.toolchain.weights import Progress

_BLOCK = 1 << 18  # characters encoded together; a block ends with a line where there is one
_BATCH = 16  # blocks that the tokenizer works on at once


@dataclass(frozen=True)
class Corpus:
    """What was read. `skipped` are files below a directory that are not UTF-8 text."""

    counts: npt.NDArray[np.int64]  # (vocab,) occurrences of each token
    num_files: int
    num_bytes: int
    skipped: tuple[Path, ...]

    @property
    def num_tokens(self) -> int:
        """Occurrences of all tokens."""
        return int(self.counts.sum())


def count_tokens(path: Path, tokenizer_json: str, vocab_size: int, progress: Progress | None = None) -> Corpus:
    """Count the tokens of a text file, or of every text file below a directory (hidden ones left out).

    Files are UTF-8. Raises ToolchainError when there is no text to read, and for a named file that is not UTF-8.
    """
    files = _files(path)
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    counts = np.zeros(vocab_size, np.int64)
    num_bytes, num_files, skipped = 0, 0, []
    for done, file in enumerate(files):
        of_file = np.zeros(vocab_size, np.int64)
        try:
            for texts in _batches(file):
                for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
                    ids = np.asarray(encoding.ids, np.int64)
                    of_file += np.bincount(ids[ids < vocab_size], minlength=vocab_size)
        except UnicodeDecodeError as error:
            if file == path:
                raise ToolchainError(
                    f"{file} is not UTF-8 text ({error}); convert it, or choose another file"
                ) from error
            skipped.append(file)
        except OSError as error:
            raise ToolchainError(f"{file} cannot be read: {error}") from error
        else:
            counts += of_file
            num_files += 1
            num_bytes += file.stat().st_size
        if progress is not None:
            progress("corpus", done + 1, len(files))
    if not counts.any():
        raise ToolchainError(f"{path} holds no text ({len(skipped)} files are not UTF-8); give text files")
    return Corpus(counts, num_files, num_bytes, tuple(skipped))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ToolchainError(f"corpus {path} does not exist; give a text file or a directory with some")
    found: list[Path] = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return [file for file in found if file.is_file()]


def _batches(file: Path) -> Iterator[list[str]]:
    batch: list[str] = []
    with open(file, encoding="utf-8", newline="") as text:
        while block := text.read(_BLOCK):
            if not block.endswith("\n"):
                block += text.readline(_BLOCK)
            if "\0" in block:
                raise UnicodeDecodeError("utf-8", b"\0", 0, 1, "it has zero bytes")
            batch.append(block)
            if len(batch) == _BATCH:
                yield batch
                batch = []
    if batch:
        yield batch
