"""Which tokens keep their row in the head: those that must stay, then those that a corpus uses most.

The head is the largest matrix of a small model and is read at every decode step; most of its rows are of tokens that a
robot never says. The embedding stays whole: prompts may have any token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import ToolchainError
from edgellm_ros.tokenizer import Tokenizer
from edgellm_ros.toolchain.checkpoint import open_checkpoint
from edgellm_ros.toolchain.corpus import Corpus, count_tokens
from edgellm_ros.toolchain.detect import load_spec
from edgellm_ros.toolchain.required_tokens import required_tokens
from edgellm_ros.toolchain.vocab_file import read_vocab_file, tokenizer_hash
from edgellm_ros.toolchain.weights import Progress
from edgellm_ros.vocab_map import VocabMap

MULTIPLE = 64  # rows: products take whole blocks of them
_NUM_SHOWN = 12


@dataclass(frozen=True)
class Reduction:
    """A chosen map and what it costs and leaves out. `corpus` is None where only a token list was given."""

    vocab: VocabMap
    tokenizer_sha256: str
    required: dict[str, int]  # why -> how many tokens
    num_required: int
    corpus: Corpus | None
    covered: float  # share of the corpus' tokens that the map has; 1.0 without a corpus
    dropped: tuple[tuple[str, int], ...]  # the most frequent tokens of the corpus that are left out, and their counts


def reduce_vocab(
    checkpoint: Path,
    corpus: Path | None = None,
    tokens: Path | None = None,
    size: int | None = None,
    coverage: float | None = None,
    progress: Progress | None = None,
) -> Reduction:
    """Choose the tokens whose head rows stay.

    `tokens` is a list that stays whole (a map's file, or a text file of ids or tokens, one a line). With a `corpus`,
    its most frequent tokens join until there are `size` tokens, or until they cover the share `coverage` of its tokens;
    exactly one of the two is given. Sizes are rounded up to MULTIPLE. Raises ToolchainError and its kinds.
    """
    if corpus is None and tokens is None:
        raise ToolchainError("a corpus, a token list or both are needed: --corpus DIR, --tokens FILE")
    if (size is None) == (coverage is None) and corpus is not None:
        raise ToolchainError("a corpus needs exactly one of --size N and --coverage SHARE")
    if coverage is not None and not 0.0 < coverage <= 1.0:
        raise ToolchainError(f"coverage is {coverage}; it is a share above 0, at most 1")
    if corpus is None and coverage is not None:
        raise ToolchainError("coverage is the share of a corpus: --coverage needs --corpus")
    source = open_checkpoint(Path(checkpoint))
    _, model = load_spec(source)
    text = source.tokenizer_json()
    if size is not None and not 1 <= size <= model.vocab_size:
        raise ToolchainError(f"size is {size}; {model.name} has 1 to {model.vocab_size} tokens")
    reasons = required_tokens(text, source.token_spec(), source.chat_template(), model.vocab_size)
    required = set().union(*reasons.values())
    tokenizer = Tokenizer(text)
    listed = read_token_list(tokens, tokenizer, model.vocab_size, tokenizer_hash(text)) if tokens is not None else set()
    kept = required | listed
    counted = count_tokens(Path(corpus), text, model.vocab_size, progress) if corpus is not None else None
    named = np.array([tokenizer.id_to_token(i) is not None for i in range(model.vocab_size)])
    counts = counted.counts if counted is not None else np.zeros(model.vocab_size, np.int64)
    chosen = choose_tokens(counts, named, kept, size, coverage)
    vocab = VocabMap(chosen, model.vocab_size)
    if len(vocab) == model.vocab_size:
        raise ToolchainError(f"all {len(vocab)} tokens of {model.name} would stay; choose a smaller size or coverage")
    left_out = np.where(vocab.rows(np.arange(model.vocab_size)) < 0, counts, 0)
    order = np.lexsort((np.arange(len(left_out)), -left_out))[:_NUM_SHOWN]
    dropped = tuple((tokenizer.decode([int(i)], skip_special=False), int(left_out[i])) for i in order if left_out[i])
    covered = 1.0 - float(left_out.sum()) / float(counts.sum()) if counted is not None else 1.0
    sizes = {why: len(ids) for why, ids in reasons.items()}
    return Reduction(vocab, tokenizer_hash(text), sizes, len(required), counted, covered, dropped)


def choose_tokens(
    counts: npt.NDArray[np.int64],
    named: npt.NDArray[np.bool_],
    kept: set[int],
    size: int | None,
    coverage: float | None,
) -> npt.NDArray[np.int64]:
    """Ascending ids: `kept`, and of the others the most frequent.

    `counts` (vocab,) orders them, equal ones by id: a tokenizer learns frequent tokens first, so low ids are also what
    fills a size that the corpus does not. `named` (vocab,): the tokenizer has a token for the id; others are never
    added. Raises ToolchainError when `kept` alone exceeds `size`.
    """
    is_kept = np.zeros(len(counts), np.bool_)
    is_kept[sorted(kept)] = True
    others = np.flatnonzero(named & ~is_kept)
    others = others[np.lexsort((others, -counts[others]))]
    if coverage is not None:
        goal = coverage * float(counts.sum()) - float(counts[is_kept].sum())
        reached = np.cumsum(counts[others])
        # Sums of counts are whole numbers: half an occurrence is room for the rounding of the product.
        size = len(kept) + (int(np.searchsorted(reached, goal - 0.5)) + 1 if goal > 0.5 else 0)
    elif size is not None and _rounded(size) < len(kept):
        raise ToolchainError(
            f"size is {size}, but {len(kept)} tokens stay in any case; choose at least {_rounded(len(kept))}"
        )
    wanted = _rounded(len(kept) if size is None else size) - len(kept)
    return np.sort(np.concatenate([np.flatnonzero(is_kept), others[:wanted]]))


def read_token_list(path: Path, tokenizer: Tokenizer, vocab_size: int, tokenizer_sha256: str) -> set[int]:
    """Token ids of a map's file, or of a text file whose lines are ids or tokens as the vocabulary writes them.

    Raises ToolchainError that names the line which is neither, and for a map of another model's vocabulary.
    """
    if path.suffix in (".json", ".safetensors"):
        file = read_vocab_file(path)
        if file.vocab_size not in (0, vocab_size) or file.tokenizer_sha256 not in ("", tokenizer_sha256):
            raise ToolchainError(
                f"{path} is a map for another tokenizer.json or vocabulary size than the checkpoint's, where its ids "
                "mean other tokens; give a text file of tokens, one a line"
            )
        found = set(file.token_ids)
    else:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ToolchainError(f"token list {path} cannot be read: {error}") from error
        found = {_token(line, f"{path}:{i}", tokenizer) for i, line in enumerate(lines, 1) if line.strip()}
    if not found:
        raise ToolchainError(f"token list {path} is empty; give token ids or tokens, one a line")
    wrong = sorted(i for i in found if not 0 <= i < vocab_size)
    if wrong:
        raise ToolchainError(f"{path} has token id {wrong[0]}; the model's are 0 to {vocab_size - 1}")
    return found


def _token(line: str, where: str, tokenizer: Tokenizer) -> int:
    text = line.removesuffix("\r")
    found = tokenizer.token_to_id(text)
    if text.strip().isdecimal() and text.strip().isascii():
        return int(text)
    if found is None:
        raise ToolchainError(f"{where} is {text!r}, which is neither a token id nor a token of the vocabulary")
    return found


def _rounded(size: int) -> int:
    return -(-size // MULTIPLE) * MULTIPLE
