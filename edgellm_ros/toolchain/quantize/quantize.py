"""From a checkpoint to a quantised one: checks, calibration, ModelOpt's unified format, written whole or not at all."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm_ros.config import Recipe
from edgellm_ros.errors import ToolchainError
from edgellm_ros.manifest import ModelSpec
from edgellm_ros.toolchain.checkpoint import open_checkpoint
from edgellm_ros.toolchain.input_factors import write_input_factors
from edgellm_ros.toolchain.kv_scales import read_kv_scales
from edgellm_ros.toolchain.quantize.calibration import BUILTIN, calibration_tokens
from edgellm_ros.toolchain.quantize.model import choose_device, load_model, open_source, stored_dtype, untie_head
from edgellm_ros.toolchain.quantize.recipe import dump_recipe, load_recipe
from edgellm_ros.toolchain.quantize.tokenizer_out import write_tokenizer
from edgellm_ros.toolchain.text_part import TextPartCheckpoint
from edgellm_ros.toolchain.weights import Progress
from edgellm_ros.toolchain.whole_output import system_errors, whole_output

QUANT_CONFIG = "hf_quant_config.json"  # ModelOpt's; the mark of what --force may replace
RECIPE_FILE = "recipe.yaml"  # the recipe as it was used, beside the weights
_PACKAGES = ("modelopt", "torch", "transformers")
_TOKENS_A_BATCH = 2048


@dataclass(frozen=True)
class Quantized:
    """What was written, and what a user should know about it."""

    path: Path
    recipe: Recipe  # as it was carried out
    algorithm: str  # ModelOpt's name
    group_size: int  # of int4 weights; 0 without
    device: str
    num_sequences: int  # of calibration text; 0 when nothing was calibrated
    source_bytes: int
    num_bytes: int
    seconds: float
    notes: tuple[str, ...]  # what differs from the recipe, and why


def quantize_and_save(
    model_dir: str | Path,
    output_dir: str | Path,
    recipe: str | Path | Recipe = "int4_awq",
    *,
    calibration: str | Path = BUILTIN,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Quantise the Hugging Face directory or GGUF file `model_dir` into the directory `output_dir`.

    recipe: a shipped recipe's name, a YAML file's path, or a Recipe. calibration: a text file, or BUILTIN. device:
    auto, cpu or cuda. progress is called with (stage, done, total). The output is ModelOpt's unified Hugging Face
    format with the tokenizer's files, which `edgellm export` reads. Raises ToolchainError and its kinds; then nothing
    is left behind.
    """
    started = time.monotonic()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    output = Path(output_dir)
    if output.exists() and not overwrite:
        raise ToolchainError(f"{output} exists; choose another directory, or let it be replaced with --force")
    if output.exists() and not (output / QUANT_CONFIG).is_file():
        raise ToolchainError(f"{output} exists and is not a quantised checkpoint; it is not replaced")
    source = open_source(Path(model_dir))
    _check_packages()
    device = choose_device(device, source)
    recipe, notes = _adapt(recipe, device)
    sequences = []
    if recipe.takes_calibration or str(calibration) != BUILTIN:  # a text that was named is looked at in any case
        sequences = calibration_tokens(calibration, source.checkpoint, recipe)
        if recipe.takes_calibration:
            _check_sequences(sequences, source.spec)
    if sequences and not recipe.takes_calibration:
        sequences = []
        notes.append(f"{calibration} is not used: these scales come from the weights alone")
    if sequences and len(sequences) < recipe.samples:
        notes.append(f"the calibration text holds {len(sequences)} sequences, fewer than the recipe's {recipe.samples}")
    if source.checkpoint.kind == "gguf":
        notes.append("the source is a GGUF file: what its own quantisation lost stays lost")
    if isinstance(source.checkpoint, TextPartCheckpoint):
        notes.append("the source is a model for images and text: its decoder alone is quantised and written")

    from edgellm_ros.toolchain.quantize import modelopt_backend as backend

    show = progress or (lambda stage, done, total: None)
    texts = () if str(calibration) == BUILTIN else (Path(calibration),)
    with whole_output(output, Path(model_dir), *texts) as partial:
        show("loading", 0, 1)
        model = load_model(source, device)
        show("loading", 1, 1)
        backend.check_layers(model, recipe)
        if recipe.lm_head != "none" and untie_head(model):
            notes.append("the head was tied to the embedding; it now has weights of its own")
        group = 0
        widths = backend.linear_widths(model, recipe)
        if widths:
            most = recipe.group_size or 128
            group = backend.common_group(widths, most)
            if group != most:
                odd = next(width for width in widths.values() if width % most)
                notes.append(f"groups of {group} instead of {most}, which do not divide {odd} input features")
        model, folded = backend.quantize_model(model, recipe, group, _Reader(sequences, recipe, show))
        show("writing", 0, 1)
        with system_errors():
            backend.save_model(model, partial, stored_dtype(source))
        write_input_factors(partial, {name: scale.numpy() for name, scale in folded.items()})
        write_tokenizer(source.checkpoint, partial)
        (partial / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8")
        show("writing", 1, 1)
    if recipe.kv_cache == "fp8":
        written = open_checkpoint(output)
        _, said = read_kv_scales(written, int(written.config["num_hidden_layers"]))
        notes += said or ("no layer of this model got scales of an FP8 KV cache: they are 1",)
    details = json.loads((output / QUANT_CONFIG).read_text(encoding="utf-8"))["quantization"]
    return Quantized(
        path=output,
        recipe=recipe,
        algorithm=str(details["quant_algo"]),
        group_size=group,
        device=device,
        num_sequences=len(sequences),
        source_bytes=source.checkpoint.num_bytes(),
        num_bytes=sum(file.stat().st_size for file in output.glob("*.safetensors")),
        seconds=time.monotonic() - started,
        notes=tuple(notes),
    )


class _Reader:
    """Lets a model read the calibration text, once for each call, and reports how far it is."""

    def __init__(self, sequences: list[list[int]], recipe: Recipe, progress: Progress) -> None:
        self._sequences, self._progress, self._pass = sequences, progress, 0
        # NVFP4 scales of the head come from its weights, and ModelOpt computes with them on a GPU only
        self._whole = recipe.lm_head in ("fp8", "int4")

    def __call__(self, model: Any) -> None:
        import torch

        self._pass += 1
        stage = f"calibrating, pass {self._pass}"
        length = len(self._sequences[0])
        step = max(1, _TOKENS_A_BATCH // length)
        for start in range(0, len(self._sequences), step):
            self._progress(stage, start, len(self._sequences))
            batch = torch.tensor(self._sequences[start : start + step], device=model.device)
            (model if self._whole else model.base_model)(batch, use_cache=False)
        self._progress(stage, len(self._sequences), len(self._sequences))


def _adapt(recipe: Recipe, device: str) -> tuple[Recipe, list[str]]:
    """The recipe that this device can carry out, and what was changed."""
    notes: list[str] = []
    if device == "cpu" and recipe.activations == "nvfp4":
        recipe = dataclasses.replace(recipe, activations="none")
        notes.append("no GPU is used: NVFP4 for the weights only (W4A16); ModelOpt quantises activations on a GPU")
    return recipe, notes


def _check_sequences(sequences: list[list[int]], model: ModelSpec) -> None:
    length, largest = len(sequences[0]), max(map(max, sequences))
    if length > model.max_context:
        raise ToolchainError(
            f"sequence_length is {length}; {model.name} reads {model.max_context} tokens at most, and what it computes "
            f"beyond would set the scales: take --sequence-length {min(256, model.max_context)}"
        )
    if largest >= model.vocab_size:
        raise ToolchainError(
            f"the tokenizer gives ids up to {largest} but the model has {model.vocab_size} embeddings; tokenizer and "
            "weights are not of the same model"
        )


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ToolchainError(f"quantize needs {', '.join(missing)}; pip install 'edgellm_ros[quantize]'")
