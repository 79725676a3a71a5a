"""What a reader of a quantised checkpoint is: which modules are quantised, how, and one at a time their numbers.

A reader checks the whole configuration against the tensors' names, dtypes and shapes before anything is read.
"""

from __future__ import annotations

import abc
import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import CheckpointError
from edgellm_ros.toolchain.quantized.packed import ActivationScale, FloatArray, PackedWeight, Scheme
from edgellm_ros.toolchain.safetensors_file import FLOATS, SafetensorsFile

SMALLEST_GROUP = 16  # input features: what every executor's integer products need at least


@dataclass(frozen=True)
class Module:
    """A quantised linear layer."""

    shape: tuple[int, int]  # (out, in), of the weight that it stands for
    scheme: Scheme

Rows = tuple[int, int] | None  # from one to before another; None: all


class Tensors:
    """All tensors of a checkpoint's safetensors files, as they are stored."""

    def __init__(self, path: Path, home: Mapping[str, SafetensorsFile]) -> None:
        """`home` says which file holds which tensor of the checkpoint at `path`."""
        self.path, self._home = path, home

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def names(self) -> Iterable[str]:
        """All names."""
        return self._home

    def dtype(self, name: str) -> str:
        """As the file says: F16, BF16, U8, F8_E4M3, …"""
        return self._home[name].dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._home[name].shape(name)

    def raw(self, name: str, rows: Rows = None) -> npt.NDArray[Any]:
        """A tensor's numbers, or some rows of them, read from the file; FP8 as bytes."""
        return self._home[name].raw(name) if rows is None else self._home[name].raw(name, *rows)

    def floats(self, name: str, rows: Rows = None) -> FloatArray:
        """A float tensor, or some rows of it, as float32; CheckpointError names it when a number is not finite."""
        shape = self.shape(name)
        if rows is not None:
            shape = (min(rows[1], shape[0]) - rows[0], *shape[1:])
        start = 0 if rows is None else rows[0]
        found = self._home[name].read_rows(name, start, start + shape[0] if shape else 1)
        if not np.isfinite(found).all():
            raise CheckpointError(f"{self.path}: {name} holds a NaN or an infinity; {DAMAGED}")
        return found.reshape(shape)


DAMAGED = "the checkpoint is damaged; download it again, or quantise the original model again"
ORIGINAL = "export the original, unquantised checkpoint instead"


class QuantReader(abc.ABC):
    """One method's layout. `modules` is complete, and checked, once the constructor returns."""

    method: ClassVar[str]  # for people

    def __init__(self, config: Mapping[str, Any], tensors: Tensors) -> None:
        """`config` is config.json's quantization_config; raises CheckpointError where it contradicts the tensors."""
        self.path, self.config, self.tensors = tensors.path, config, tensors
        self.modules: dict[str, Module] = {}  # by the module's name, such as model.layers.0.self_attn.q_proj
        self.parts: set[str] = set()  # names of the tensors that belong to them
        self.notes: list[str] = []  # what is left out, for the manifest
        self.folded = False  # see Checkpoint.folded
        self.scan()

    @abc.abstractmethod
    def scan(self) -> None:
        """Fill modules, parts and notes; check everything."""

    @abc.abstractmethod
    def read(self, module: str) -> PackedWeight:
        """The numbers of one module."""

    def read_parts(self, module: str, step: int) -> Iterator[PackedWeight]:
        """`read` in parts of `step` rows, a multiple of 8; by default all are unpacked at once."""
        whole = self.read(module)
        for start in range(0, whole.shape[0], step):
            yield whole.take(slice(start, start + step))

    def activation_scale(self, module: str) -> ActivationScale | None:
        """How the module's input is rounded, with one scale for all tokens; None where it is not, or otherwise."""
        return None

    def kv_scales(self, prefix: str) -> tuple[float, float] | None:
        """See Checkpoint.kv_scales. Raises CheckpointError for what is no positive number, or one for each head."""
        names = [next((n for n in _kv_names(prefix, part) if n in self.tensors), None) for part in "kv"]
        found = [1.0 if name is None else self._kv_scale(name) for name in names]
        return None if names == [None, None] else (found[0], found[1])

    def _kv_scale(self, name: str) -> float:
        values = self.tensors.floats(name)
        if values.size != 1:
            raise self.error(f"{name} is {list(values.shape)}; read is one scale of the KV cache for a layer")
        if not values.reshape(()) > 0:
            raise self.error(f"{name} is {float(values.reshape(()))}; a scale of the KV cache must be above 0", DAMAGED)
        return float(values.reshape(()))

    @abc.abstractmethod
    def describe(self) -> str:
        """Method, bits and groups in a few words, for `edgellm inspect`."""

    # What scan and read are made of.

    def error(self, what: str, remedy: str = ORIGINAL) -> CheckpointError:
        """An error about this checkpoint."""
        return CheckpointError(f"{self.path}: {what}; {remedy}")

    def need(self, name: str, shape: Sequence[tuple[int, ...]], dtypes: Sequence[str], why: str) -> str:
        """`name`, checked to be there with one of the shapes and dtypes; it becomes one of `parts`."""
        if name not in self.tensors:
            raise self.error(f"{name} is missing; {why} needs it", DAMAGED)
        found, dtype = self.tensors.shape(name), self.tensors.dtype(name)
        if found not in shape:
            allowed = " or ".join(str(list(s)) for s in dict.fromkeys(shape))
            raise self.error(f"{name} is {list(found)}; {why} needs {allowed}", "the configuration and the tensors do "
                             "not belong together: download the checkpoint again")  # fmt: skip
        if dtype not in dtypes:
            raise self.error(f"{name} is stored as {dtype}; {why} needs {' or '.join(dtypes)}", "the configuration and "
                             "the tensors do not belong together: download the checkpoint again")  # fmt: skip
        self.parts.add(name)
        return name

    def groups(self, module: str, columns: int, group: int) -> int:
        """How many groups of `group` (0 or -1: one) the module's input features make."""
        if group in (0, -1):
            group = columns
        if group < 0 or columns % group:
            raise self.error(
                f"{module} has {columns} input features, which do not divide into groups of {group} as the "
                "quantization_config says"
            )
        stored = group if group < columns else columns
        if math.gcd(stored, columns) % SMALLEST_GROUP:
            raise self.error(
                f"{module}: groups of {stored} input features; what is stored are multiples of {SMALLEST_GROUP}"
            )
        return columns // group

    def integer(self, key: str, allowed: Sequence[int], default: int | None = None) -> int:
        """An integer of the quantization_config that must be one of `allowed`."""
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
            known = ", ".join(map(str, allowed))
            raise self.error(f"quantization_config: {key} is {value!r}; read are {known}")
        return value

    def group_size(self, key: str = "group_size", default: int | None = None) -> int:
        """The quantization_config's group size, -1 for a whole row."""
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not (value == -1 or value >= SMALLEST_GROUP):
            raise self.error(
                f"quantization_config: {key} is {value!r}; read are -1 (a row) and sizes from {SMALLEST_GROUP}"
            )
        return value

    def check_covered(self, excluded: Sequence[str], prefixes: bool = False) -> None:
        """Raise for a decoder layer's linear weight that is plain though `excluded` does not name it, or the reverse.

        excluded: names or patterns of modules; a name also covers what lies below it. `prefixes`: any part of a name
        counts, as transformers reads modules_to_not_convert.
        """
        for module in self.modules:
            if is_excluded(module, excluded, prefixes):
                raise self.error(
                    f"{module} is quantised, yet the quantization_config excludes it", "correct the "
                    "configuration: " + ", ".join(excluded)
                )  # fmt: skip
        for name in self.tensors.names():
            module, _, kind = name.rpartition(".")
            plain = kind == "weight" and name not in self.parts and len(self.tensors.shape(name)) == 2
            if plain and ".layers." in module and not is_excluded(module, excluded, prefixes):
                raise self.error(
                    f"{name} is stored as {self.tensors.dtype(name)}, yet the quantization_config says that every "
                    f"linear layer is quantised but {', '.join(excluded) or 'none'}",
                    "add it to the list, or download the whole checkpoint",
                )

    def check_order(self, name: str, index: npt.NDArray[Any], groups: int) -> bool:
        """Whether `index`, each input feature's group, is not sorted; raises where groups are not of equal size."""
        size = len(index) // groups
        counts = np.bincount(index, minlength=groups) if index.min(initial=0) >= 0 else np.zeros(0)
        if not np.array_equal(counts, np.full(groups, size)):
            raise self.error(f"{name} does not give each of {groups} groups {size} input features", DAMAGED)
        return bool((np.diff(index) < 0).any())

    def reject_leftovers(self, suffixes: Sequence[str]) -> None:
        """Raise for a tensor with one of `suffixes` that belongs to no quantised module."""
        for name in self.tensors.names():
            if name not in self.parts and name.endswith(tuple(suffixes)):
                raise self.error(f"{name} belongs to no quantised layer", DAMAGED)


def is_excluded(module: str, patterns: Sequence[str], prefixes: bool = False) -> bool:
    """Whether one of the names, `*` patterns or `re:` expressions covers a module."""
    for pattern in patterns:
        below = pattern.rstrip("*").rstrip(".") + "."
        if pattern.startswith("re:"):
            try:
                found = re.match(pattern[3:], module) is not None
            except re.error as error:
                raise CheckpointError(f"quantization_config: {pattern!r} is no regular expression: {error}") from error
        else:
            found = fnmatch.fnmatchcase(module, pattern) or module.startswith(below) or (prefixes and pattern in module)
        if found:
            return True
    return False


def _kv_names(prefix: str, part: str) -> tuple[str, ...]:
    """What tools call the scale of a layer's keys (k) or values (v): ModelOpt, llm-compressor, vLLM, older ones."""
    at = f"{prefix}self_attn."
    places = (f"{part}_proj.", "qkv_proj.", "", "attn.")
    return (*(f"{at}{place}{part}_scale" for place in places), f"{at}kv_scale")


def group_order(index: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """The input features sorted by their group."""
    return np.argsort(index, kind="stable").astype(np.int32)


def text_list(value: Any) -> list[str]:
    """A configuration's list of names; None is none."""
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else []


PLAIN = tuple(FLOATS)
