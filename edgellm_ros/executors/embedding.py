"""Token ids to embedding rows, straight from the mapped weight file: only the rows that are used are ever read."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.bundle import Bundle


class EmbeddingTable:
    """The model's input embedding, stored as int8 in groups, fp16 or fp32."""

    def __init__(self, bundle: Bundle) -> None:
        """Map the table of `bundle`."""
        weights = bundle.weights()
        self._table: npt.NDArray[Any] = weights["embed.weight"]  # (vocab, hidden)
        self._scale: npt.NDArray[np.float16] | None = None  # (vocab, hidden / group)
        if "embed.scale" in weights:
            self._scale = weights["embed.scale"]
        self._offset: npt.NDArray[np.float32] | None = None  # as scale
        if "embed.offset" in weights:
            self._offset = weights["embed.offset"]
        self._factor = np.float32(bundle.manifest.model.embed_scale)

    def lookup(self, token_ids: npt.NDArray[np.int32], out: npt.NDArray[np.float32]) -> None:
        """Write the rows of `token_ids` (n,) to `out` (n, hidden) fp32."""
        rows = self._table[token_ids]
        if self._scale is None:
            out[...] = rows
        else:
            scale = self._scale[token_ids].astype(np.float32)
            groups = rows.reshape(len(rows), scale.shape[1], -1)
            np.multiply(groups, scale[..., None], out=out.reshape(groups.shape))
            if self._offset is not None:
                out.reshape(groups.shape)[...] += self._offset[token_ids][..., None]
        if self._factor != 1.0:
            out *= self._factor
