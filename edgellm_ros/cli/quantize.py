"""`edgellm quantize`: makes a quantised checkpoint of an original one, with a progress bar, and says what it did."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm_ros.cli.options import add_settings, settings_from
from edgellm_ros.cli.progress import shown_progress
from edgellm_ros.config import Recipe

if TYPE_CHECKING:
    from rich.table import Table

    from edgellm_ros.toolchain.quantize.quantize import Quantized

HELP = "quantise a checkpoint with NVIDIA ModelOpt"
EXAMPLES = """\
examples:
  edgellm quantize Qwen3-0.6B -o qwen3-fp8 --recipe fp8
  edgellm quantize Qwen3-0.6B -o qwen3-int4 --recipe int4_awq --samples 64 --calib logs.txt
  edgellm quantize Qwen3-0.6B -o qwen3-mine --recipe my_recipe.yaml
  edgellm export qwen3-fp8 -o qwen3                    then a bundle of it

recipes: fp8, int4_awq, int4_gptq, int8_sq, nvfp4, w4a8_awq; they are YAML files in config/recipes, to be copied and
changed. The output is ModelOpt's unified Hugging Face format, with recipe.yaml beside the weights. A GPU is used where
torch sees one. No network is used; pip install 'edgellm_ros[quantize]' brings what it needs. More: docs/quantize.md.
"""
_FROM_RECIPE = ("weights", "activations", "method", "exclude")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory with safetensors, or .gguf file")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", required=True, help="directory to write")
    parser.add_argument(
        "--recipe", default="int4_awq", metavar="NAME|FILE", help="a recipe's name, or a .yaml file (default int4_awq)"
    )
    parser.add_argument(
        "--calib", default="builtin", metavar="FILE|builtin", help="calibration text, UTF-8 (default builtin: English)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (default) is the GPU if there is one"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing quantised checkpoint")
    add_settings(parser, Recipe, "instead of what the recipe says", skip=_FROM_RECIPE, defaults=False)


def execute(args: argparse.Namespace) -> int:
    """Quantise, then show what was made."""
    import os

    from rich.console import Console

    from edgellm_ros.errors import ToolchainError

    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars, between ours
    try:
        from edgellm_ros.toolchain.quantize.quantize import quantize_and_save
        from edgellm_ros.toolchain.quantize.recipe import load_recipe
    except ImportError as error:
        raise ToolchainError(f"quantize needs the package {error.name}; pip install 'edgellm_ros[quantize]'") from error

    recipe = settings_from(args, load_recipe(args.recipe))
    with shown_progress() as show:
        made = quantize_and_save(
            args.checkpoint,
            args.output,
            recipe,
            calibration=args.calib,
            device=args.device,
            overwrite=args.force,
            progress=show,
        )
    Console(highlight=False).print(_table(made))
    return 0


def _table(made: Quantized) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from edgellm_ros.cli.inspect import human_bytes

    recipe = made.recipe
    table = Table(title=escape(str(made.path)), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    groups = f", groups of {made.group_size}" if made.group_size else ""
    table.add_row("format", f"{made.algorithm}{groups}")
    table.add_row("weights", f"{recipe.weights}, activations {recipe.activations}, by {recipe.method}")
    table.add_row("head, KV cache", f"{recipe.lm_head}, {recipe.kv_cache}")
    text = f"{made.num_sequences} sequences of {recipe.sequence_length} tokens"
    table.add_row("calibrated with", text if made.num_sequences else "nothing: the scales come from the weights alone")
    table.add_row("size", f"{human_bytes(made.source_bytes)} → {human_bytes(made.num_bytes)}")
    table.add_row("took", f"{made.seconds:.1f} s on {'a GPU' if made.device == 'cuda' else 'a CPU'}")
    for note in made.notes:
        table.add_row("note", escape(note))
    table.add_row("next", escape(f"edgellm export {made.path} -o BUNDLE"))
    return table
