"""What the executors over the native module share: a decoder that steps, runs ahead, and copies prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import DeviceError, UnsupportedError
from edgellm_ros.executors.adapter_table import AdapterTable
from edgellm_ros.executors.base import Executor, LoadedAdapter, SequenceStep


class NativeExecutor(Executor):
    """Over a `_native.TokenLoop`, which a subclass makes and loads."""

    _decoder: Any  # None once it is closed
    _adapters: AdapterTable
    _max_loras: int
    _no_trees: str = ""  # why verify_tree cannot be called, and what to do

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """See Executor.adapters."""
        return dict(self._adapters.loaded)

    def unload_adapter(self, name: str) -> None:
        """See Executor.unload_adapter."""
        self._open().unload_adapter(self._adapters.remove(name))

    def enter_thread(self) -> None:
        """See Executor.enter_thread. A thread begins with the first GPU, which need not be the constructor's."""
        self._open().make_current()

    def step(self, batch: Sequence[SequenceStep]) -> npt.NDArray[np.float32]:
        """See Executor.step. Single tokens cost one graph for every eight; longer steps one pass each, or more."""
        for item in batch:
            end = item.position + len(item.token_ids)
            assert 0 <= item.slot < self.info.num_slots and item.position >= 0 and end <= self.info.capacity, item
            assert 0 <= item.num_logits <= len(item.token_ids), item
            assert 0 <= item.adapter <= self._max_loras, item
        rows: npt.NDArray[np.float32] = self._open().step(
            [(item.slot, item.token_ids, item.position, item.num_logits, item.adapter) for item in batch]
        )
        return rows

    def decode_tokens(
        self,
        slots: Sequence[int],
        positions: Sequence[int],
        first_tokens: Sequence[int],
        num_steps: int,
        sampling: Sequence[Any] = (),
        adapters: Sequence[int] = (),
    ) -> npt.NDArray[np.int32]:
        """Generate on the device: each token feeds the next step, and the host reads one step behind.

        The sequences' first tokens are computed at `positions` of `slots`. `sampling` holds one `_native.SamplingRow` a
        sequence; none is greedy. `adapters` holds the index of each sequence's adapter, 0 for none; empty: nobody's.
        Returns (num_steps, num_sequences) tokens.
        """
        assert max(positions) + num_steps <= self.info.capacity, (positions, num_steps)
        tokens: npt.NDArray[np.int32] = self._open().decode_tokens(
            slots, positions, first_tokens, num_steps, list(sampling), list(adapters)
        )
        return tokens

    @property
    def max_tree_nodes(self) -> int:
        """The most nodes of a draft tree; 0 where `verify_tree` is refused."""
        return int(self._open().config.max_verify_tokens)

    def verify_tree(
        self,
        slot: int,
        position: int,
        token_ids: npt.NDArray[np.int32],
        parents: npt.NDArray[np.int32],
        adapter: int = 0,
    ) -> npt.NDArray[np.float32]:
        """Compute a draft tree behind the `position` tokens of `slot` and return every node's logits.

        `token_ids` and `parents` are (num_nodes,): parents[i] < i is the node that node i follows, -1 a root, which
        follows the prefix. Node i sees the prefix, its ancestors and itself, at position `position` + its depth.
        Returns (num_nodes, vocab) fp32, valid until the next call. The slot holds the prefix afterwards, and the nodes
        in a form that only `accept_path` reads; steps at `position` overwrite them. Needs `position` + num_nodes to fit
        the slot and num_nodes to be at most `max_tree_nodes`; raises ValueError otherwise, DeviceError when the device
        fails, UnsupportedError where that is 0.
        """
        assert len(token_ids) == len(parents), (len(token_ids), len(parents))
        if not self.max_tree_nodes:
            raise UnsupportedError(self._no_trees)
        rows: npt.NDArray[np.float32] = self._open().verify_tree(slot, position, token_ids, parents, adapter)
        return rows

    def accept_path(self, slot: int, position: int, nodes: Sequence[int]) -> None:
        """Keep `nodes` of the tree that `verify_tree` computed last at `position` of `slot`: a path from a root down.

        Their keys and values move to positions `position`, `position` + 1, …: the slot then holds `position` +
        len(nodes) tokens as if they had been decoded one by one. Raises ValueError when the indices do not ascend.
        """
        self._open().accept_path(slot, position, np.asarray(nodes, np.int32))

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """See Executor.copy_prefix."""
        self._open().copy_prefix(source, target, length)

    def save_prefix(self, slot: int, length: int) -> npt.NDArray[np.uint8]:
        """See Executor.save_prefix."""
        data: npt.NDArray[np.uint8] = self._open().save_prefix(slot, length)
        return data

    def load_prefix(self, slot: int, data: npt.NDArray[np.uint8], length: int) -> None:
        """See Executor.load_prefix."""
        self._open().load_prefix(slot, data, length)

    @property
    def decoder(self) -> Any:
        """The native decoder, for what measures it; raises DeviceError when the executor is closed."""
        return self._open()

    def close(self) -> None:
        """See Executor.close."""
        self._decoder = None

    def _open(self) -> Any:
        if self._decoder is None:
            raise DeviceError(f"the {self.info.name} executor is closed")
        return self._decoder
