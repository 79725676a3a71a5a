"""How a checkpoint's own integers are stored in a bundle: which format each layer gets, and its tensors.

Layers that are stored together (q, k, v; gate, up) need one format. Where they differ, all get the wider one, which
holds the narrower one's numbers exactly; only floats beside integers of one product are stored as fp16 together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.errors import CheckpointError, ToolchainError
from edgellm_ros.executors.kv_scales import projection_factors, row_factors
from edgellm_ros.executors.small_floats import e4m3_bytes
from edgellm_ros.manifest import LinearFormat, ModelSpec, QuantSpec
from edgellm_ros.toolchain.checkpoint import Checkpoint
from edgellm_ros.toolchain.families import family_of
from edgellm_ros.toolchain.layers import EMBEDDING, HEAD, layer_prefix
from edgellm_ros.toolchain.quantized.packed import (
    INTEGERS,
    NVFP4_GROUP,
    FloatArray,
    PackedWeight,
    common_group,
    stack,
)

_LARGEST_GROUP = 128  # of a stored scale: larger ones are repeated, which changes nothing
WHOLE_INPUT = ("input_scale", "input_factor", "input_order")  # stored tensors that have no row for each output
_LARGEST_OF_ROW = 64  # the same for one scale a row: ONNX Runtime batches int8 exactly up to here


@dataclass(frozen=True)
class _Layer:
    """A stored linear layer: the checkpoint's weights that make it, and its format."""

    names: tuple[str, ...]
    format: LinearFormat
    kept: bool = True  # False: made of floats


class KeptWeights:
    """The plan for one checkpoint whose `quantization()` is not empty."""

    def __init__(self, source: Checkpoint, model: ModelSpec, tables: str = "fp16") -> None:
        """Choose every layer's format; raises CheckpointError where the integers cannot be kept.

        tables: fp16 or int8, of a head and an embedding that the checkpoint has as floats.
        """
        self._source, self._model = source, model
        self._notes: dict[str, None] = dict.fromkeys(source.quantization_notes())
        self._rounding = 0.0  # largest relative change of a scale
        self._layers: dict[str, _Layer] = {}
        self._linears = family_of(model).linears
        for layer in range(model.num_layers):
            for stem, modules in self._linears.items():
                names = tuple(f"{layer_prefix(layer)}{m}.weight" for m in modules)
                self._layers[f"layers.{layer}.{stem}"] = self._choose(names)
        self._layers["embed"] = self._choose_embedding()
        if not model.tied_head:
            self._layers["head"] = self._choose((HEAD,))
        if tables == "int8":
            group = _table_group(model)
            floats = [stem for stem in ("embed", "head") if stem in self._layers and not self._layers[stem].kept]
            for stem in floats:
                self._layers[stem] = replace(self._layers[stem], format=LinearFormat("int8", group))
            if not floats:
                self._notes["--lm-head changes nothing: head and embedding are kept as the checkpoint has them"] = None
        self._share_row_groups()

    @property
    def quant(self) -> QuantSpec:
        """The bundle's QuantSpec; its notes are complete once every layer's tensors were taken."""
        body = {stem: layer.format for stem, layer in self._layers.items() if stem.startswith("layers.")}
        most = Counter(f for f in body.values() if f.scheme != "fp16") or Counter(body.values())
        usual = most.most_common(1)[0][0]
        embed = self._layers["embed"].format
        head = self._layers["head"].format if "head" in self._layers else embed
        kept, notes = self._source.quantization(), self._all_notes()
        quant = QuantSpec(usual.scheme, usual.group_size, head.scheme, embed.scheme, {}, kept, notes)
        kinds: dict[str, LinearFormat] = {}
        for kind in self._linears:
            counts = Counter(f for stem, f in body.items() if stem.endswith(f".{kind}"))
            kinds[kind] = counts.most_common(1)[0][0]
        formats = {kind: form for kind, form in kinds.items() if quant.format_of(kind) != form}
        formats |= {stem: form for stem, form in body.items() if kinds[stem.split(".", 2)[2]] != form}
        for stem, form in (("head", head), ("embed", embed)):
            if quant.format_of(stem) != form:
                formats[stem] = form
        return replace(quant, formats=formats)

    def is_kept(self, stem: str) -> bool:
        """Whether `tensors` has the layer; others are floats and stored as the plan says."""
        found = self._layers.get("embed" if stem == "head" and "head" not in self._layers else stem)
        return found is not None and found.kept

    def tensors(self, stem: str) -> dict[str, npt.NDArray[Any]]:
        """What is stored for a layer, by the name after its stem."""
        return self.stored(stem, [self._source.packed(name) for name in self._layers[stem].names])

    def stored(self, stem: str, parts: list[PackedWeight]) -> dict[str, npt.NDArray[Any]]:
        """The same for the weights of the layer's modules, or for some rows of a table's one."""
        layer = self._layers.get(stem) or self._layers["embed"]
        form = layer.format
        weight = stack([_convert(part, form) for part in parts], stem)
        factors = row_factors(self._model, stem)
        if factors is not None:
            weight = weight.times_rows(factors)
        found: dict[str, npt.NDArray[Any]] = {"weight": _stored_values(weight)}
        if form.scheme in INTEGERS:
            found["scale"] = self._half(weight.scale, stem)
        elif form.scheme == "nvfp4":
            assert weight.global_scale is not None
            found["scale"] = e4m3_bytes(weight.scale)
            found["global_scale"] = weight.global_scale
        else:
            found["scale"] = weight.scale if form.group_size else weight.scale.reshape(-1)
        if form.offset:
            found["offset"] = np.zeros_like(weight.scale) if weight.offset is None else weight.offset
        if form.activation:
            found["input_scale"] = np.array([self._stored_input_scale(stem)], np.float32)
        if form.input_order:
            assert weight.order is not None
            found["input_order"] = weight.order
        if form.input_factor:
            assert weight.input_factor is not None
            found["input_factor"] = weight.input_factor
        return found

    def _choose(self, names: tuple[str, ...]) -> _Layer:
        schemes = [self._source.scheme(name) for name in names]
        found = [s for s in schemes if s is not None]
        kinds = {s.kind for s in found}
        if len(found) < len(names) or not (kinds <= set(INTEGERS) or len(kinds) == 1):
            if found:
                mixed = ", ".join("floats" if s is None else s.kind for s in schemes)
                self._notes[f"{names[0]} and what shares its input are {mixed}: dequantised to fp16"] = None
            return _Layer(names, LinearFormat("fp16"), kept=False)
        columns = self._source.shape(names[0])[1]
        group = common_group([s.group for s in found], columns)
        kind = found[0].kind
        if kind in INTEGERS:
            kind = "int8" if "int8" in kinds else "int4"
            most = _LARGEST_OF_ROW if all(s.group == 0 for s in found) else _LARGEST_GROUP
            group = min(group & -group, most)  # MatMulNBits has powers of two
        elif kind == "fp8":
            group = 0 if group == columns else group
        else:
            group = NVFP4_GROUP
        # A factor stays with this layer alone: in the norm before it, it would reach a LoRA adapter's input too.
        flags = (any(s.offset for s in found), any(s.input_factor for s in found), any(s.ordered for s in found))
        whole = flags[0] and all(s.kind == "int4" and (s.zero_points or not s.offset) for s in found)
        return _Layer(names, LinearFormat(kind, group, *flags, whole, self._activation(names, kind)))

    def _activation(self, names: tuple[str, ...], kind: str) -> str:
        """What the portable graph rounds the layer's input to: FP8 where the weights are, for engines to multiply in.

        INT8 is left out: TensorRT-RTX 1.7 does not build it beside weights with scales of groups.
        """
        value = self._input_scale(names)
        if value is None:
            return ""
        if kind != "fp8":
            self._notes[f"activations of {kind} layers stay floating point: input_scale is not used"] = None
            return ""
        if value < float(np.finfo(np.float16).tiny):
            self._notes[f"an input_scale of {value:.2g} is below fp16's range: that input is not rounded"] = None
            return ""
        self._notes[
            "the portable graph rounds activations with the checkpoint's input_scale; the ONNX Runtime graph and the "
            "cuda executor do not"
        ] = None
        return kind

    def _stored_input_scale(self, stem: str) -> float | None:
        """Attention's output is a mean of values, which are stored divided by their scale."""
        scale = self._input_scale(self._layers[stem].names)
        if scale is None or not (self._model.kv_scales and stem.endswith("attn.o")):
            return scale
        return scale / projection_factors(self._model, int(stem.split(".")[1]))["o_proj"]

    def _input_scale(self, names: tuple[str, ...]) -> float | None:
        """The largest of the layers' that share an input; None where one of them has none."""
        scales = [self._source.activation_scale(name) for name in names]
        found = [scale.value for scale in scales if scale is not None]
        return max(found) if len(found) == len(names) else None

    def _choose_embedding(self) -> _Layer:
        """Rows are looked up by the executors, which know int8 in groups and floats."""
        chosen = self._choose((EMBEDDING,))
        if chosen.format.scheme in INTEGERS:
            return replace(chosen, format=replace(chosen.format, scheme="int8"))
        if chosen.kept:
            self._notes[f"{EMBEDDING} is {chosen.format.scheme}: dequantised to fp16"] = None
        return _Layer((EMBEDDING,), LinearFormat("fp16"), kept=False)

    def _share_row_groups(self) -> None:
        """Layers with one scale a row get one group size, which the native kernels want."""
        whole = [
            stem
            for stem, layer in self._layers.items()
            if layer.kept
            and layer.format.scheme in INTEGERS
            and all((s := self._source.scheme(name)) is not None and s.group == 0 for name in layer.names)
        ]
        smallest = min((self._layers[stem].format.group_size for stem in whole), default=0)
        for stem in whole:
            layer = self._layers[stem]
            self._layers[stem] = replace(layer, format=replace(layer.format, group_size=smallest))

    def _half(self, scale: FloatArray, stem: str) -> npt.NDArray[np.float16]:
        with np.errstate(over="ignore"):
            half = scale.astype(np.float16)
        if not np.isfinite(half).all():
            raise CheckpointError(
                f"{self._source.path}: {stem} has a scale of {np.abs(scale).max():.3g}, stored are fp16 ones up to "
                "65504; export with --weights int4 or int8, which quantises again"
            )
        change = np.abs(half.astype(np.float32) - scale) / np.maximum(np.abs(scale), np.finfo(np.float16).tiny)
        self._rounding = max(self._rounding, float(change.max(initial=0.0)))
        return half

    def _all_notes(self) -> tuple[str, ...]:
        rounded = f"scales rounded to fp16, by at most {self._rounding:.2g} of their value"
        return (*self._notes, *([rounded] if self._rounding else []))


def _table_group(model: ModelSpec) -> int:
    for size in (64, 32, 16):
        if model.hidden_size % size == 0:
            return size
    raise ToolchainError(
        f"{model.name} is {model.hidden_size} wide, which does not divide into groups of 16 for an int8 head; leave "
        "--lm-head out"
    )


def _convert(weight: PackedWeight, form: LinearFormat) -> PackedWeight:
    """The same numbers in a format that holds them."""
    if form.scheme in INTEGERS:
        return replace(weight.regroup(form.group_size), kind=form.scheme)
    if form.scheme == "fp8" and form.group_size:
        return weight.regroup(form.group_size)
    return weight


def _stored_values(weight: PackedWeight) -> npt.NDArray[Any]:
    if weight.kind != "int4":
        return weight.values
    nibbles = weight.values.view(np.uint8) & 15
    packed: npt.NDArray[Any] = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return packed
