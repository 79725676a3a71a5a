"""The adapters of the ONNX Runtime executor: each linear layer's A and B, bound as inputs of `decoder.lora.ort.onnx`.

A sequence without an adapter, or a layer that its adapter leaves alone, has matrices of rank 0, and zeros are added.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.executors.adapter_table import AdapterTable
from edgellm_ros.executors.base import LoadedAdapter
from edgellm_ros.executors.lora import LoraAdapter, read_adapter
from edgellm_ros.executors.lora_layout import FloatArray, PackedLora, fit, pack_matrices, stacks_of, unpack
from edgellm_ros.manifest import GraphSpec, ModelSpec

Matrices = Mapping[str, FloatArray]  # by the name of the graph's input


def planned_bytes(model: ModelSpec, max_loras: int, max_rank: int) -> int:
    """Memory of `max_loras` adapters that change everything with `max_rank`."""
    each = sum(len(s.parts) * max_rank * (s.in_features + s.out_features) for s in stacks_of(model))
    return max_loras * model.num_layers * each * 4


class OrtAdapters:
    """What is loaded, and what a run of the session binds for it."""

    def __init__(self, model: ModelSpec, graph: GraphSpec, max_loras: int, max_rank: int) -> None:
        """Adapters may have projections of at most `max_rank`."""
        self._model, self._graph, self._max_rank = model, graph, max_rank
        self._table = AdapterTable(max_loras)
        self._none: dict[str, FloatArray] = {}
        for layer in range(model.num_layers):
            for stack in stacks_of(model):
                a, b = self._names(layer, stack.stem)
                self._none[a] = np.zeros((stack.in_features, 0), np.float32)
                self._none[b] = np.zeros((0, stack.out_features), np.float32)
        self._matrices: dict[int, Matrices] = {0: self._none}

    @property
    def loaded(self) -> Mapping[str, LoadedAdapter]:
        """By name."""
        return dict(self._table.loaded)

    def load(self, name: str, source: str | Path | LoraAdapter | PackedLora) -> LoadedAdapter:
        """See Executor.load_adapter."""
        index = self._table.free_place(name)
        if isinstance(source, PackedLora):
            fit(unpack(source, self._model), self._model, self._max_rank, self._remedy)
            matrices, fingerprint = source.matrices, source.fingerprint
        else:
            found = source if isinstance(source, LoraAdapter) else read_adapter(source)
            adapter = fit(found, self._model, self._max_rank, self._remedy)
            packed, _ = pack_matrices(adapter, self._model)
            matrices, fingerprint = packed, adapter.fingerprint
        bound = dict(self._none)
        for (layer, stem), pair in matrices.items():
            for key, values in zip(self._names(layer, stem), pair, strict=True):
                bound[key] = np.require(values, np.float32, ("C", "A"))
        self._matrices[index] = bound
        return self._table.add(name, index, fingerprint)

    def unload(self, name: str) -> int:
        """See Executor.unload_adapter; returns the place that became free."""
        index = self._table.remove(name)
        del self._matrices[index]
        return index

    def inputs(self, index: int) -> Mapping[str, npt.NDArray[Any]]:
        """What the session wants for the adapter in place `index`, 0 for none."""
        assert index in self._matrices, f"a step names adapter {index}, which is not loaded"
        return self._matrices[index]

    @property
    def _remedy(self) -> str:
        return "; load the model with a larger max_lora_rank" if self._max_rank < 64 else ""

    def _names(self, layer: int, stem: str) -> tuple[str, str]:
        return self._graph.lora_a.format(layer=layer, stem=stem), self._graph.lora_b.format(layer=layer, stem=stem)
