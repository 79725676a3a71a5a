"""Which of the kernels' formats a bundle's stored weight gets, and what that costs.

A format with kernels is kept. One without is widened when it is loaded, to the smallest that holds its numbers:

- int4 with zero points becomes int8, which holds value less zero point exactly;
- int4 with other offsets becomes int8 with an offset for each group, which is rounded to fp16, by 2^-11 of it at most;
- nvfp4 becomes int8 in groups of 16, which holds twice its numbers; the product of its two scales is rounded likewise;
- groups that the kernels do not have, and floats, become bf16, rounded by 2^-9 at most.

Factors and orders of a layer's input go into the layers before it where that changes no number, are done on the device
by a kernel of their own elsewhere (cuda_inputs.py), and go into the columns of what is bf16 anyway.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace

from edgellm_ros.manifest import LinearFormat, ModelSpec, QuantSpec

GROUPED = ("int4", "int8")
FLOATS = ("fp16", "fp32")
LARGEST_GROUP = 128  # of the kernels; larger ones have their scales repeated
SMALLEST_GROUP = 16
SMALLEST_BLOCK = 64  # of fp8


@dataclass(frozen=True)
class NativeFormat:
    """What the device has of one stored weight."""

    format: str  # a name of the native WeightFormat
    group: int = 0  # input features that share a scale; int8 and int4
    reason: str = ""  # why it has more bytes than the stored weight; empty where it has not, and for floats
    order: bool = False  # the device puts the layer's input in the columns' order
    factor: bool = False  # the device multiplies the layer's input

    @property
    def stored(self) -> LinearFormat:
        """The stored format that has these numbers; but for offsets, which it has in fp32, it has these bytes too."""
        scheme = {"bf16": "fp16", "int8_offset": "int8", "fp8_blocks": "fp8"}.get(self.format, self.format)
        return LinearFormat(scheme, self.group, offset=self.format == "int8_offset")


def native_format(stem: str, form: LinearFormat, model: ModelSpec) -> NativeFormat:
    """The device's format of the layer `stem` (layers.0.attn.qkv, head, embed), stored in `form`."""
    found = _format_of_numbers(stem, form)
    order = form.input_order and not folds_order(stem)
    factor = form.input_factor and not folds_factor(stem, model)
    if found.format == "bf16" or not (order or factor):
        return found
    if not stem.startswith("layers."):
        return NativeFormat("bf16", reason="its input features in another order")
    return replace(found, order=order, factor=factor)


def _format_of_numbers(stem: str, form: LinearFormat) -> NativeFormat:
    """Whatever is said of the layer's input."""
    scheme, group = form.scheme, min(form.group_size, LARGEST_GROUP)
    if scheme in FLOATS:
        return NativeFormat("bf16")
    if scheme == "fp8" and not form.group_size:
        return NativeFormat("fp8")
    if scheme == "fp8":
        group = math.gcd(form.group_size, LARGEST_GROUP)
        if group >= SMALLEST_BLOCK and stem != "embed":
            return NativeFormat("fp8_blocks", group)
        return NativeFormat("bf16", reason=f"a scale for each {form.group_size} columns")
    if group < SMALLEST_GROUP or form.group_size % group or group & (group - 1):
        return NativeFormat("bf16", reason=f"groups of {form.group_size}")
    if scheme == "nvfp4":
        return NativeFormat("int8", group, "two levels of scales")
    if form.offset and scheme == "int4" and form.zero_points:
        return NativeFormat("int8", group, "zero points")
    if form.offset and stem == "embed":
        return NativeFormat("bf16", reason="offsets that are no small zero points")
    if form.offset:
        return NativeFormat("int8_offset", group, "" if scheme == "int8" else "offsets that are no small zero points")
    if scheme == "int4" and stem == "embed":
        return NativeFormat("int8", group, "the embedding lookup")
    return NativeFormat(scheme, group)


def folds_factor(stem: str, model: ModelSpec) -> bool:
    """Whether a factor of the layer's input goes into what makes that input: a norm's gain, or rows of a projection.

    The rows of v do for attn.o where every head has its own.
    """
    return stem != "embed" and (not stem.endswith("attn.o") or model.num_heads == model.num_kv_heads)


def folds_order(stem: str) -> bool:
    """Whether the order of the layer's input becomes that of the rows which make it: those of gate and up."""
    return stem.endswith("mlp.down")


def native_formats(model: ModelSpec, quant: QuantSpec) -> dict[str, NativeFormat]:
    """Of every stored linear layer, the head and the embedding, by stem."""
    stems = [f"layers.{layer}.{kind}" for layer in range(model.num_layers) for kind in linear_shapes(model)]
    tables = dict.fromkeys([quant.head_tensor(model), "embed"])
    return {stem: native_format(stem, quant.format_of(stem), model) for stem in [*stems, *tables]}


def linear_shapes(model: ModelSpec) -> dict[str, tuple[int, int]]:
    """(out, in) of a layer's linear layers."""
    hidden, inner = model.hidden_size, model.intermediate_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "attn.qkv": (q + 2 * kv, hidden),
        "attn.o": (hidden, q),
        "mlp.gate_up": (2 * inner, hidden),
        "mlp.down": (hidden, inner),
    }


def as_on_device(model: ModelSpec, quant: QuantSpec) -> QuantSpec:
    """How the bundle would be stored if it had the device's formats: for sums of bytes."""
    return replace(quant, formats={stem: found.stored for stem, found in native_formats(model, quant).items()})


def widenings(model: ModelSpec, quant: QuantSpec) -> list[str]:
    """A line for each kind of layer that is wider on the device than stored, with what that costs."""
    kinds: dict[tuple[str, str, NativeFormat], list[float]] = defaultdict(list)
    sizes = {**linear_shapes(model), "embed": (model.vocab_size, model.hidden_size)}
    sizes["head"] = (model.num_rows, model.hidden_size)
    for stem, found in native_formats(model, quant).items():
        if not found.reason:
            continue
        kind = stem.split(".", 2)[2] if stem.startswith("layers.") else stem
        form, (rows, columns) = quant.format_of(stem), sizes[kind]
        kinds[kind, form.scheme, found].append(rows * columns * (_bytes(found.stored, 2.0) - _bytes(form, 4.0)))
    return [
        f"{len(more)} x {kind}: {scheme} with {found.reason} as {found.format}, {sum(more) / 1e6:+.0f} MB"
        for (kind, scheme, found), more in kinds.items()
    ]


def _bytes(form: LinearFormat, offset: float) -> float:
    """Of a weight, where an offset has `offset`."""
    weight = {"fp32": 4.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "nvfp4": 0.5, "int4": 0.5}[form.scheme]
    scale = {"nvfp4": 1.0, "fp8": 4.0}.get(form.scheme, 2.0) + (offset if form.offset else 0.0)
    return weight + (scale / form.group_size if form.group_size else 0.0)
