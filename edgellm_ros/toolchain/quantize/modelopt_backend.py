"""How a recipe is carried out with nvidia-modelopt; the one module that imports it."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that this transformers is newer than the ones it was tested with
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint, quant_utils
    from modelopt.torch.export.unified_export_hf import collect_shared_input_modules
    from modelopt.torch.quantization.conversion import set_quantizer_by_cfg_context
    from modelopt.torch.quantization.model_calib import apply_pre_quant_scale_and_smooth, max_calibrate
    from modelopt.torch.quantization.nn import SequentialQuantizer

from edgellm_ros.config import RECIPE_GROUPS, Recipe
from edgellm_ros.errors import ToolchainError
from edgellm_ros.toolchain.quantize.products import SharedInput, parts_of, read_inputs, side_by_side
from edgellm_ros.toolchain.quantize.rounding import HIGHEST, Corrections, choose_scales, round_columns
from edgellm_ros.toolchain.quantize.scaling import choose_factor

Forward = Callable[[Any], None]
_log = logging.getLogger(__name__)

# weights, activations: ModelOpt's configuration, whose formats the recipe names
_CONFIGS = {
    ("fp8", "fp8"): "FP8_DEFAULT_CFG",
    ("int4", "none"): "INT4_AWQ_CFG",
    ("int4", "fp8"): "W4A8_AWQ_BETA_CFG",
    ("int8", "int8"): "INT8_SMOOTHQUANT_CFG",
    ("nvfp4", "nvfp4"): "NVFP4_DEFAULT_CFG",
    ("nvfp4", "none"): "W4A16_NVFP4_CFG",
}
_FP8 = {"num_bits": (4, 3), "axis": None}
_SIDE_BY_SIDE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # read the same
_NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}


def quantize_model(
    model: Any, recipe: Recipe, group_size: int, forward: Forward
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Insert quantisers by `recipe`, calibrate them with `forward` (called with the model, perhaps several times).

    group_size: what int4 weights get, as `common_group` chose it. Input scales that AWQ or SmoothQuant found are then
    folded into the layer before, so that no operator remains for them. Returns the model, and by what folding
    multiplied what a layer reads (`MODULE.in`) and gives (`MODULE.out`).
    """
    folded: dict[str, torch.Tensor] = {}
    rounded = recipe.weights == "int4" or recipe.lm_head == "int4"
    measured = recipe.activations != "none" or recipe.kv_cache != "none" or recipe.lm_head == "fp8"
    with _quietly():
        later = rounded and recipe.method != "smoothquant"  # nothing but weights is looked at before they have changed
        first = forward if recipe.takes_calibration and not later else None
        model = mtq.quantize(model, _configuration(recipe, group_size), first)
        known: list[SharedInput] = []
        if recipe.method == "awq":
            known = _scale_inputs(model, group_size, forward)
        if recipe.method in ("awq", "smoothquant"):
            folded = _fold_input_scales(model)
        if measured and (recipe.method != "max" or rounded):
            _measure(model, recipe, forward, known)
        if rounded:
            _round_int4(model, group_size, forward, known)
    return model, folded


def save_model(model: Any, output: Path, dtype: Any) -> None:
    """Write config.json, hf_quant_config.json and safetensors to `output`; what is not quantised becomes `dtype`."""
    with _quietly():
        model.to(dtype)
        model.config.dtype = dtype
        export_hf_checkpoint(model, dtype=dtype, export_dir=output)


def common_group(widths: dict[str, int], most: int) -> int:
    """The largest of RECIPE_GROUPS up to `most` that divides every layer's input features, which `check_layers` saw.

    widths: module name to input features.
    """
    return next(size for size in RECIPE_GROUPS if size <= most and all(width % size == 0 for width in widths.values()))


def linear_widths(model: Any, recipe: Recipe) -> dict[str, int]:
    """Input features of every linear layer that will be int4, by module name."""
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if module is head:
            if recipe.lm_head == "int4":
                found[name] = module.in_features
        elif recipe.weights == "int4" and not any(_leaves_out(pattern, name) for pattern in recipe.exclude):
            found[name] = module.in_features
    return found


def check_layers(model: Any, recipe: Recipe) -> None:
    """Raise ToolchainError for a pattern that no linear layer has, where nothing is left, and for odd input features.

    Bundles store groups of 16 at least, and ModelOpt's NVFP4 has them.
    """
    head = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    names = [name for name, module in layers.items() if module is not head]
    for pattern in recipe.exclude:
        if not any(_leaves_out(pattern, name) for name in names):
            raise ToolchainError(
                f"exclude has {pattern!r}, which no linear layer's name fits; they are like {names[0]} and {names[-1]}"
            )
    left = [name for name in names if not any(_leaves_out(pattern, name) for pattern in recipe.exclude)]
    if not left:
        raise ToolchainError(f"exclude {', '.join(recipe.exclude)} leaves no layer to quantise; take a pattern out")
    if recipe.lm_head != "none":
        left += [name for name, module in layers.items() if module is head]
    smallest = RECIPE_GROUPS[-1]
    for name in left:
        width = layers[name].in_features
        if width % smallest:
            raise ToolchainError(
                f"{name} has {width} input features, which do not divide into groups of {smallest}, and bundles "
                f"store no smaller ones; leave it out of the recipe, exclude: ['*{name.rpartition('.')[2]}*'], or "
                "export the original with --weights fp16"
            )


def _configuration(recipe: Recipe, group_size: int) -> dict[str, Any]:
    """ModelOpt's quantisation configuration; later rules win."""
    config: dict[str, Any] = copy.deepcopy(getattr(mtq, _CONFIGS[recipe.weights, recipe.activations]))
    if recipe.method in ("awq", "gptq"):  # which are carried out after ModelOpt has set its quantisers up
        config["algorithm"] = "max"
    rules = config["quant_cfg"]
    for rule in rules:
        formats = rule.get("cfg") or []
        for item in formats if isinstance(formats, list) else [formats]:
            if item.get("num_bits") == 4:
                item["block_sizes"] = _int4(group_size)["block_sizes"]
    rules += [{"quantizer_name": _quantisers_of(pattern), "enable": False} for pattern in recipe.exclude]
    head = {"fp8": _FP8, "int4": _int4(group_size), "nvfp4": _NVFP4}
    if recipe.lm_head != "none":
        rules.append({"quantizer_name": "*lm_head.weight_quantizer", "cfg": head[recipe.lm_head], "enable": True})
    if recipe.lm_head == "fp8":  # FP8 products take both operands in FP8; the others leave the head's input alone
        rules.append({"quantizer_name": "*lm_head.input_quantizer", "cfg": _FP8, "enable": True})
    if recipe.kv_cache == "fp8":
        rules += copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    return config


def _int4(group_size: int) -> dict[str, Any]:
    return {"num_bits": 4, "block_sizes": {-1: group_size, "type": "static"}}


def _leaves_out(pattern: str, name: str) -> bool:
    return fnmatch.fnmatch(f"{name}.weight_quantizer", _quantisers_of(pattern))


def _quantisers_of(pattern: str) -> str:
    return pattern if pattern.endswith("*") else f"{pattern}.*"


def _fold_input_scales(model: Any) -> dict[str, torch.Tensor]:
    """Fold the scales of AWQ and SmoothQuant into norms and into the projections before, with ModelOpt's own functions.

    Its table of projections names some families' classes only; the pairs are the same wherever both projections are.
    Scales of heads that share a value head are averaged. Returns what `quantize_model` does.
    """
    names, found = {module: name for name, module in model.named_modules()}, {}
    for linear in _of_parted(model):  # the norm has to suit the layers that are left out as well
        scale = _input_scale(linear)
        if scale is not None:
            quant_utils._update_pre_quant_scale(linear, torch.ones_like(scale))
            del linear.input_quantizer._pre_quant_scale
    pairs = [("v_proj", "o_proj"), ("up_proj", "down_proj")]
    classes = {
        pair: sorted({type(m).__name__ for m in model.modules() if all(hasattr(m, part) for part in pair)})
        for pair in pairs
    }
    linked = [
        (getattr(m, earlier), getattr(m, later))
        for m in model.modules() for earlier, later in pairs if hasattr(m, earlier) and hasattr(m, later)
    ]  # fmt: skip
    scales = {after: _input_scale(after) for _, after in linked}
    before = quant_utils.PQS_FUSE_MODULE_MAPPING
    quant_utils.PQS_FUSE_MODULE_MAPPING = [(of_pair, pair) for pair, of_pair in classes.items()]
    try:
        quant_utils.fuse_prequant_to_linear(model, fuse_grouped_heads=True)
    finally:
        quant_utils.PQS_FUSE_MODULE_MAPPING = before
    shared = _shared_values(model)
    for earlier, later in linked:
        scale = scales[later]
        if scale is not None and _input_scale(later) is None:
            heads = shared.get(later)
            if heads is not None:
                scale = scale.view(heads).mean(1, keepdim=True)
                found[f"{names[later]}.in"] = scale.expand(heads).reshape(-1)
            else:
                found[f"{names[later]}.in"] = scale
            found[f"{names[earlier]}.out"] = scale.reshape(-1)
    probe = torch.ones([1, 2], dtype=torch.long, device=model.device)
    sharing, norms = collect_shared_input_modules(model, lambda: model(probe), collect_layernorms=True)
    groups = [(norms[read], linears) for read, linears in sharing.items() if norms[read] is not None]
    head, last = model.get_output_embeddings(), getattr(model.base_model, "norm", None)
    if last is not None and hasattr(head, "input_quantizer"):
        groups.append((last, [head]))  # a slice stands between them, which the probe does not see through
    for norm, linears in groups:
        if all(hasattr(linear.input_quantizer, "_pre_quant_scale") for linear in linears):
            quant_utils.preprocess_linear_fusion(linears)
            scale = _input_scale(linears[0])  # by now that of all
            found |= {f"{names[linear]}.in": scale for linear in linears if scale is not None}
            quant_utils.fuse_prequant_layernorm(norm, linears)
    return {name: scale.detach().float().cpu().clone() for name, scale in found.items()}


def _input_scale(linear: Any) -> torch.Tensor | None:
    scale: torch.Tensor | None = getattr(getattr(linear, "input_quantizer", None), "_pre_quant_scale", None)
    return scale


def _measure(model: Any, recipe: Recipe, forward: Forward, known: list[SharedInput]) -> None:
    """Let ModelOpt's quantisers have the largest values that layers read after folding.

    known: what the int4 layers read, from which these follow without another reading unless more is to be measured.
    """
    if not known or recipe.kv_cache != "none" or recipe.lm_head == "fp8":
        max_calibrate(model, forward)
        return
    max_calibrate(model)  # of the weights alone
    for shared in known:
        for layer in shared.layers:
            if layer.input_quantizer.is_enabled:
                layer.input_quantizer.amax = shared.largest.max()


def _scale_inputs(model: Any, group_size: int, forward: Forward) -> list[SharedInput]:
    """Let int4 layers multiply what they read by AWQ's factors, and divide their weights; see scaling.py.

    Returns XᵀX of what the layers read now, where all of it fits into memory at once.
    """
    layers, parts = _int4_quantizers(model), 0
    known: list[SharedInput] = []
    heads, parted = _shared_values(model), set(_of_parted(model))
    for part in parts_of(layers):
        parts += 1
        known = read_inputs(part, lambda: _read(model, forward))

        def chosen(shared: SharedInput) -> torch.Tensor:
            weights = [layer.weight.detach() for layer in shared.layers]
            corrections = Corrections.of(shared.product)
            return choose_factor(weights, shared.product, corrections, group_size, heads.get(shared.layers[0]))

        for shared, factor in zip(known, side_by_side(chosen, known), strict=True):
            if not parted.isdisjoint(shared.layers):
                continue
            shared.product /= torch.outer(factor, factor)
            shared.largest /= factor
            for layer in shared.layers:
                apply_pre_quant_scale_and_smooth(layer, 1 / factor)
    return known if parts == 1 else []


def _of_parted(model: Any) -> list[Any]:
    """Quantised layers that read what a layer reads which the recipe leaves out: they can have no factor."""
    found = []
    for module in model.modules():
        for names in _SIDE_BY_SIDE:
            linears = [getattr(module, name) for name in names if hasattr(module, name)]
            quantised = [linear for linear in linears if _is_quantised(linear)]
            found += quantised if len(quantised) < len(linears) else []
    return found


def _is_quantised(linear: Any) -> bool:
    found = getattr(linear, "weight_quantizer", None)
    found = found[0] if isinstance(found, SequentialQuantizer) else found
    return found is not None and bool(found.is_enabled)


def _shared_values(model: Any) -> dict[Any, tuple[int, int, int]]:
    """The layers behind attention whose query heads share values: (key-value heads, heads that share one, features)."""
    found = {}
    for module in model.modules():
        if hasattr(module, "v_proj") and hasattr(module, "o_proj"):
            size = module.head_dim
            num_values, num_read = module.v_proj.out_features // size, module.o_proj.in_features // size
            found[module.o_proj] = (num_values, num_read // num_values, size)
    return found


def _round_int4(model: Any, group_size: int, forward: Forward, known: list[SharedInput]) -> None:
    """Round int4 weights by what they do to the calibration text, and give ModelOpt the scales; see rounding.py.

    known: XᵀX of all layers; where it is empty the text is read.
    """
    quantizers = _int4_quantizers(model)

    def round_one(shared: SharedInput) -> None:
        left = getattr(shared.layers[0].input_quantizer, "_pre_quant_scale", None)  # that was not folded away
        if left is not None and not known:
            shared.product *= torch.outer(left.float(), left.float())
        weight = torch.cat([layer.weight.detach().float() for layer in shared.layers])
        scale = choose_scales(weight, shared.product, group_size)
        weight = round_columns(weight, scale, Corrections.of(shared.product))
        sizes = [layer.out_features for layer in shared.layers]
        for layer, rows, steps in zip(shared.layers, weight.split(sizes), scale.split(sizes), strict=True):
            layer.weight.data = rows.to(layer.weight.dtype, copy=True)
            largest = quantizers[layer]._amax
            largest.copy_((steps * HIGHEST).reshape(largest.shape))

    for part in [list(quantizers)] if known else parts_of(quantizers):
        for _ in side_by_side(round_one, known or read_inputs(part, lambda: _read(model, forward))):
            pass


def _int4_quantizers(model: Any) -> dict[Any, Any]:
    """The linear layers whose weights become int4, and their quantisers."""
    quantizers = {}
    for module in model.modules():
        found = getattr(module, "weight_quantizer", None)
        found = found[0] if isinstance(found, SequentialQuantizer) else found  # W4A8: int4, then FP8
        if found is not None and found.is_enabled and found.num_bits == 4:
            quantizers[module] = found
    return quantizers


def _read(model: Any, forward: Forward) -> None:
    """Let the model read the calibration text with weights and activations as they are."""
    with set_quantizer_by_cfg_context(model, [{"quantizer_name": "*", "enable": False}]):
        forward(model)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """ModelOpt prints; what it says goes to the log, and warnings that a user can do nothing about nowhere."""
    said = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("modelopt", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(said), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for line in said.getvalue().splitlines():
            _log.info("modelopt: %s", line)
