"""Which tokens a model reads while its scales are measured: windows of a text, spread over all of it."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from edgellm_ros.config import Recipe
from edgellm_ros.errors import ToolchainError
from edgellm_ros.toolchain.checkpoint import Checkpoint

BUILTIN = "builtin"
BUILTIN_FILE = Path(__file__).with_name("calibration.txt")
_FEWEST = 4  # sequences; the largest activation of less text is a guess


def calibration_tokens(source: str | Path, checkpoint: Checkpoint, recipe: Recipe) -> list[list[int]]:
    """`recipe.samples` sequences of `recipe.sequence_length` token ids from the text file `source`, or BUILTIN.

    They do not overlap and are spread evenly; fewer are taken when the text holds fewer. A sequence starts with the
    beginning-of-sequence token where the model wants one. Raises ToolchainError for a file that cannot be read, is not
    UTF-8 text, or holds less than four sequences.
    """
    path = BUILTIN_FILE if str(source) == BUILTIN else Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ToolchainError(f"calibration file {path} is not UTF-8 text ({error}); give a text file") from error
    except OSError as error:
        raise ToolchainError(
            f"calibration file {path} cannot be read: {error.strerror or error}; give a text file, or `{BUILTIN}`"
        ) from error
    tokenizer = tokenizers.Tokenizer.from_str(checkpoint.tokenizer_json())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    spec = checkpoint.token_spec()
    start = [spec.bos_id] if spec.add_bos and spec.bos_id is not None else []
    length = recipe.sequence_length - len(start)
    available = len(ids) // length
    if available < _FEWEST:
        raise ToolchainError(
            f"calibration file {path} holds {len(ids)} tokens, which make {available} sequences of "
            f"{recipe.sequence_length}; at least {_FEWEST} are needed: give more text, or a smaller --sequence-length"
        )
    count = min(recipe.samples, available)
    first = [index * (available - 1) // max(count - 1, 1) * length for index in range(count)]
    return [start + ids[at : at + length] for at in first]
