"""How a bundle's stored weights become the kernels' formats: which one, and the numbers in it.

All linear layers of the decoder have one format and group on the device. Where some are int8, or int4 with zero points,
all are int8, which holds the value of an int4 weight less its zero point exactly; larger groups have their scales
repeated. What none of this gives is refused by the layer's name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_ros.bundle import Bundle, LinearFormat, WeightFile
from edgellm_ros.errors import BundleError, UnsupportedError

Array = npt.NDArray[Any]

# The bundle's schemes as the kernels have them. fp8 is stored as it is, or made at load from floats.
_FORMATS = {"fp32": "bf16", "fp16": "bf16", "fp8": "fp8", "int8": "int8", "int4": "int4"}
_KINDS = ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")
_GROUPED = ("int4", "int8")


@dataclass(frozen=True)
class NativeFormats:
    """Names of native WeightFormats, and the group that all int4 and int8 weights have."""

    layer: str
    head: str
    embedding: str
    group: int

    def of(self, stem: str) -> str:
        """The format of a stored layer."""
        return {"head": self.head, "embed": self.embedding}.get(stem, self.layer)


def native_formats(bundle: Bundle) -> NativeFormats:
    """What the device will have; raises UnsupportedError that names the first layer which the kernels cannot run."""
    model, quant = bundle.manifest.model, bundle.manifest.quantization
    stems = [f"layers.{layer}.{kind}" for layer in range(model.num_layers) for kind in _KINDS]
    tables = list(dict.fromkeys([quant.head_tensor(model), "embed"]))
    forms = {stem: quant.format_of(stem) for stem in [*stems, *tables]}
    for stem, form in forms.items():
        _check(stem, form)
    layers = [forms[stem] for stem in stems]
    first = layers[0]
    if all(form.scheme in _GROUPED for form in layers):
        wide = any(form.scheme == "int8" or form.offset for form in layers)
        layer = "int8" if wide else "int4"
    else:
        for stem, form in zip(stems, layers, strict=True):
            if form.scheme != first.scheme:
                raise _refusal(stem, f"is {form.scheme}, {stems[0]} {first.scheme}")
        layer = _FORMATS[first.scheme]
    head, embedding = (forms[quant.head_tensor(model)], forms["embed"])
    groups = [form.group_size for form in forms.values() if form.scheme in _GROUPED]
    return NativeFormats(layer, _table_format(head), _table_format(embedding), math.gcd(*groups) if groups else 0)


def native_weight(weights: WeightFile, stem: str, form: LinearFormat, formats: NativeFormats) -> tuple[Array, Any]:
    """A stored weight's numbers and scales (or None) as the native loader takes them.

    Raises BundleError for an offset that is not the zero point which the manifest promises.
    """
    values: Array = weights[f"{stem}.weight"]
    if f"{stem}.scale" not in weights:
        return values, None
    scale: Array = weights[f"{stem}.scale"]
    if form.scheme not in _GROUPED:
        return values, scale
    if formats.of(stem) == "int8" and form.scheme == "int4":
        nibbles = values.view(np.int8)
        values = np.stack([(nibbles << 4) >> 4, nibbles >> 4], axis=-1).reshape(len(nibbles), -1)
    if form.offset:
        zeros = _zero_points(weights[f"{stem}.offset"], scale, stem)
        grouped = values.reshape(*scale.shape, -1)
        values = (grouped + zeros[..., None]).reshape(values.shape)
    times = form.group_size // formats.group
    return values, np.repeat(scale, times, axis=1) if times > 1 else scale


def _zero_points(offset: Array, scale: Array, stem: str) -> npt.NDArray[np.int8]:
    """(out, in / group): what to add to the values."""
    wide = scale.astype(np.float32)
    zeros = np.rint(np.divide(offset, wide, out=np.zeros_like(wide), where=wide != 0))
    # Scales may have been rounded to fp16 after the offset was made of them.
    if np.abs(zeros).max(initial=0) > 15 or (np.abs(offset - zeros * wide) > 2e-3 * np.abs(offset)).any():
        raise BundleError(f"{stem}.offset is not a zero point for each group, as the manifest says; export again")
    return zeros.astype(np.int8)


def _table_format(form: LinearFormat) -> str:
    return "int8" if form.scheme == "int4" and form.offset else _FORMATS[form.scheme]


def _check(stem: str, form: LinearFormat) -> None:
    """Raise UnsupportedError for a stored format that no kernel has, nor any that could hold it."""
    problem = ""
    if form.scheme not in _FORMATS:
        problem = f"is {form.scheme}"
    elif form.scheme == "fp8" and form.group_size:
        problem = f"is fp8 with a scale for each {form.group_size} input features instead of each row"
    elif form.offset and not (form.zero_points and form.scheme == "int4"):
        problem = f"is {form.scheme} with an offset for each group that is no small zero point"
    elif form.input_factor:
        problem = "multiplies its input by a stored factor (pre_quant_scale)"
    elif form.input_order:
        problem = "takes its input features in another order (GPTQ with desc_act)"
    if problem:
        raise _refusal(stem, problem)


def _refusal(stem: str, problem: str) -> UnsupportedError:
    return UnsupportedError(
        f"{stem} of the bundle {problem}, which the cuda executor does not have; use the executor onnxruntime, "
        "or export again with --weights int4, int8 or fp16"
    )
