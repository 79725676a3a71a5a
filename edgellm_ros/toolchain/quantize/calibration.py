"""Which tokens a model reads while its scales are measured: windows of a text, spread over all of it."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

import tokenizers

from edgellm_ros.config import Recipe
from edgellm_ros.errors import ToolchainError
from edgellm_ros.toolchain.checkpoint import Checkpoint

BUILTIN = "builtin"
BUILTIN_FILE = Path(__file__).with_name("calibration.txt")
_FEWEST = 4  # sequences; the largest activation of less text is a guess
_LARGE = 8 << 20  # bytes, some seconds of tokenising: of a larger text only pieces are read
_BYTES_PER_TOKEN = 16  # that a piece has, and more than any written language takes


def calibration_tokens(source: str | Path, checkpoint: Checkpoint, recipe: Recipe) -> list[list[int]]:
    """`recipe.samples` sequences of `recipe.sequence_length` token ids from the text file `source`, or BUILTIN.

    They do not overlap and are spread evenly; fewer are taken when the text holds fewer. A sequence starts with the
    beginning-of-sequence token where the model wants one. Of a file above 8 MB only as much is read as the sequences
    take. Raises ToolchainError for a file that cannot be read, is not UTF-8 text, or holds less than four sequences.
    """
    path = BUILTIN_FILE if str(source) == BUILTIN else Path(source)
    spec = checkpoint.token_spec()  # which refuses a damaged tokenizer
    tokenizer = tokenizers.Tokenizer.from_str(checkpoint.tokenizer_json())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    start = [spec.bos_id] if spec.add_bos and spec.bos_id is not None else []
    length = recipe.sequence_length - len(start)
    windows: list[list[int]] = []
    num_tokens = 0
    for text in _read(path, recipe.samples, recipe.sequence_length * _BYTES_PER_TOKEN):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        num_tokens += len(ids)
        windows += [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    available = len(windows)
    if available < _FEWEST:
        raise ToolchainError(
            f"calibration file {path} holds {num_tokens} tokens, which make {available} sequences of "
            f"{recipe.sequence_length}; at least {_FEWEST} are needed: give more text, or a smaller --sequence-length"
        )
    count = min(recipe.samples, available)
    return [start + windows[index * (available - 1) // max(count - 1, 1)] for index in range(count)]


def _read(path: Path, num_pieces: int, piece_bytes: int) -> list[str]:
    """The text as one piece or, of a large file, `num_pieces` of `piece_bytes` bytes from all over it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= max(_LARGE, num_pieces * piece_bytes):
                return [file.read().decode("utf-8")]
            pieces = []
            for index in range(num_pieces):
                file.seek(index * (size - piece_bytes) // max(num_pieces - 1, 1))
                pieces.append(_decode_piece(file.read(piece_bytes)))
            return pieces
    except UnicodeDecodeError as error:
        raise ToolchainError(f"calibration file {path} is not UTF-8 text ({error}); give a text file") from error
    except OSError as error:
        raise ToolchainError(
            f"calibration file {path} cannot be read: {error.strerror or error}; give a text file, or `{BUILTIN}`"
        ) from error


def _decode_piece(data: bytes) -> str:
    """UTF-8 that was cut anywhere, from its first whole character, and word where that is near, on."""
    start = 0
    while start < min(3, len(data)) and data[start] & 0xC0 == 0x80:  # the rest of a character
        start += 1
    text = codecs.getincrementaldecoder("utf-8")().decode(data[start:])
    word = text.find(" ", 0, 100)
    return text[word:] if word > 0 else text
