"""A bundle's logits, by the executor that a robot would use; prompts are read in pieces, as it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.executors import SequenceStep, create_executor
from edgellm_ros.toolchain.verify.passages import Ids, Passage

_LOGITS_AT_ONCE = 1 << 22  # a few arrays of this size are in memory
_MAX_PIECE = 128


class ExecutorReading:
    """Reads passages one by one when their logits are asked for."""

    def __init__(self, bundle: Bundle, passages: Sequence[Passage], executor: str) -> None:
        """Load `bundle`; raises what `create_executor` does."""
        self._passages = passages
        capacity = max(len(passage.ids) for passage in passages)
        config = EngineConfig(executor=executor, max_slots=1, max_context=capacity, prefill_chunk=_MAX_PIECE)
        self._executor = create_executor(bundle, config)
        info = self._executor.info
        self.description = f"{info.name} on {info.device}"
        self._vocab = info.vocab_map
        columns = info.vocab_size if self._vocab is None else len(self._vocab)
        self._piece = max(8, min(_MAX_PIECE, _LOGITS_AT_ONCE // columns) // 8 * 8)

    def pieces(self, passage: int, count: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Position and logits of the last `count` tokens of a passage, a piece at a time, each valid till the next."""
        ids = self._passages[passage].ids
        first = len(ids) - count
        for start in range(0, len(ids), self._piece):
            piece = ids[start : start + self._piece]
            wanted = max(0, start + len(piece) - max(first, start))
            logits = self._executor.step([SequenceStep(0, piece, start, wanted)])
            if wanted:
                yield start + len(piece) - wanted, logits

    def rows(self, token_ids: Ids) -> Ids:
        """The logits' columns of some tokens; -1 for one that a reduced head has no row for."""
        return token_ids if self._vocab is None else self._vocab.rows(token_ids)

    def close(self) -> None:
        """Free the executor."""
        self._executor.close()
