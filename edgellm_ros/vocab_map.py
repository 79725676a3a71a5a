"""Which token a row of a reduced head stands for: executors give rows, everything that a caller sees is token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer[Any]]


class VocabMap:
    """The token ids whose head rows were kept, ascending: row i of the logits is token `token_ids[i]`."""

    def __init__(self, token_ids: Ids, vocab_size: int) -> None:
        """`vocab_size` is the whole vocabulary's.

        Raises ValueError for ids that do not ascend, are none, or are outside 0 to `vocab_size` - 1.
        """
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
            raise ValueError(f"a vocabulary map is a list of token ids; this one has shape {ids.shape} of {ids.dtype}")
        if ids[0] < 0 or ids[-1] >= vocab_size:
            raise ValueError(f"it has token ids {ids[0]} to {ids[-1]}; the model's are 0 to {vocab_size - 1}")
        if not (ids[1:] > ids[:-1]).all():
            place = int(np.flatnonzero(ids[1:] <= ids[:-1])[0])
            raise ValueError(f"its token ids must ascend, and {ids[place + 1]} follows {ids[place]}")
        self.vocab_size = vocab_size
        self.token_ids: npt.NDArray[np.int32] = ids.astype(np.int32)  # (rows,)
        self._row_of = np.full(vocab_size, -1, np.int32)
        self._row_of[self.token_ids] = np.arange(len(ids), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __contains__(self, token: int) -> bool:
        return bool(self._row_of[token] >= 0)

    def rows(self, token_ids: npt.ArrayLike) -> npt.NDArray[np.int32]:
        """The row of each token of the vocabulary, -1 for one that was dropped."""
        found: npt.NDArray[np.int32] = self._row_of[np.asarray(token_ids, np.int64)]
        return found
