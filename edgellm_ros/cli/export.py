"""`edgellm export`: makes a bundle of a checkpoint, with a progress bar, and shows the result."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgellm_ros.bundle import Bundle
    from edgellm_ros.quality import Quality

HELP = "make a bundle of a Hugging Face directory or a GGUF file"
EXAMPLES = """\
examples:
  edgellm export SmolLM2-135M-Instruct -o smollm2               int4, the smallest and fastest
  edgellm export Qwen3-0.6B -o qwen3 --weights int8             closer to the original
  edgellm export model-Q4_1.gguf -o model --max-context 16384
  edgellm export Qwen3-0.6B-NVFP4 -o qwen3        quantised by others: its numbers are kept
  edgellm export Qwen3-0.6B-AWQ -o qwen3 --verify --against Qwen3-0.6B    refused if it lost too much
  edgellm export SmolLM2-135M-Instruct -o smollm2 --vocab-map map.json    a smaller head, by edgellm reduce-vocab
  edgellm export SmolLM2-135M-Instruct -o smollm2 --max-lora-rank 16      adapters can be packed into it
  edgellm export SmolLM2-135M-Instruct -o smollm2 --dialect plugin         also for TensorRT of JetPack 6 and 7.1

No network is used; download the checkpoint first. The model family is detected from config.json or GGUF metadata.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory with safetensors, or .gguf file")
    parser.add_argument("-o", "--output", type=Path, metavar="BUNDLE", required=True, help="directory to write")
    parser.add_argument(
        "--weights",
        choices=("keep", "int4", "int8", "fp16", "fp32"),
        help="how weights are stored (default: keep what a quantised checkpoint has, else int4)",
    )
    parser.add_argument(
        "--lm-head",
        choices=("fp16", "int8"),
        help="head and embedding of a checkpoint that is kept and has them as floats (default fp16; int8 is a quarter "
        "of what a CPU reads for them, and what --weights int4 has)",
    )
    parser.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="tokens that prompt and answer may take together (default: the model's, at most 8192; a longrope model's "
        "original context, beyond which it takes its long factors)",
    )
    parser.add_argument(
        "--vocab-map", type=Path, metavar="FILE", help="keep only these tokens' rows of the head (edgellm reduce-vocab)"
    )
    parser.add_argument(
        "--max-lora-rank",
        type=int,
        default=0,
        metavar="R",
        help="write decoders that take LoRA adapters up to this rank, for requests to name (default 0: none)",
    )
    parser.add_argument(
        "--dialect",
        choices=("standard", "plugin"),
        default="standard",
        help="plugin also writes what TensorRT before 10.15 (JetPack 6 and 7.1) builds from, with this project's "
        "plugins",
    )
    parser.add_argument("--name", default="", help="the model's name for people (default: the checkpoint's)")
    parser.add_argument(
        "--verify", action="store_true", help="measure what it lost (edgellm verify); one that fails a mark is refused"
    )
    parser.add_argument(
        "--against", type=Path, metavar="ORIGINAL", help="what --verify compares with (default: CHECKPOINT itself)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace an existing bundle; with --verify, keep one that fails too"
    )


def execute(args: argparse.Namespace) -> int:
    """Export, then show the bundle's table."""
    from edgellm_ros.cli.inspect import print_bundle
    from edgellm_ros.cli.progress import shown_progress
    from edgellm_ros.cli.verify import measure, print_quality, store
    from edgellm_ros.errors import ToolchainError

    try:
        from edgellm_ros.toolchain.export import export_bundle
        from edgellm_ros.toolchain.verify.reading import CheckpointReading
    except ImportError as error:
        raise ToolchainError(f"export needs the package {error.name}; pip install 'edgellm_ros[toolchain]'") from error

    if args.against and not args.verify:
        raise ToolchainError("--against is what --verify compares with; add --verify")

    # A wrong name is said now, not after the export.
    original = CheckpointReading(args.against) if args.against else None
    replaced = _adapters_of(args.output)
    refused: list[Quality] = []

    class Refused(ToolchainError):
        """Leaves the export without a bundle."""

    try:
        with shown_progress() as show:

            def accept(bundle: Bundle) -> None:
                _check_template(bundle, args.checkpoint)
                if not args.verify:
                    return
                quality = measure(bundle, show, args.force, against=original or args.checkpoint)
                store(bundle, quality)
                if quality.failed and not quality.accepted:
                    refused.append(quality)
                    raise Refused

            bundle = export_bundle(
                args.checkpoint,
                args.output,
                weights=args.weights,
                max_context=args.max_context,
                name=args.name,
                overwrite=args.force,
                progress=show,
                vocab_map=args.vocab_map,
                max_lora_rank=args.max_lora_rank,
                lm_head=args.lm_head,
                dialect=args.dialect,
                accept=accept,
            )
    except Refused:
        print_quality(str(args.output), refused[0])
        print(f"error: {args.output} is not written: it lost too much; more bits or `edgellm quantize` lose "
              "less, --force lets it through", file=sys.stderr)  # fmt: skip
        return 1
    if args.verify:
        print_quality(str(bundle.path), bundle.manifest.quality)
    print_bundle(bundle, "just written")
    if not bundle.manifest.tokens.stop_ids:
        print("warning: the checkpoint names no token that ends an answer, so generation ends only at max_tokens; set "
              "eos_token_id in its generation_config.json and export again", file=sys.stderr)  # fmt: skip
    if replaced:
        print(f"note: the bundle that was replaced had the adapters {', '.join(replaced)}, which were packed for its "
              "weights; pack them again with `edgellm lora pack`", file=sys.stderr)  # fmt: skip
    return 0


def _check_template(bundle: Bundle, checkpoint: Path) -> None:
    """Raise ToolchainError for a chat template that no runtime could compile: the bundle could not be opened."""
    from edgellm_ros.bundle import CHAT_TEMPLATE
    from edgellm_ros.chat import ChatTemplate
    from edgellm_ros.errors import TemplateError, ToolchainError

    try:
        if bundle.has(CHAT_TEMPLATE):
            ChatTemplate(bundle.read_text(CHAT_TEMPLATE), bundle.manifest.tokens)
    except TemplateError as error:
        raise ToolchainError(f"{checkpoint}: {error}; correct it, or take it out of the checkpoint's files") from error


def _adapters_of(output: Path) -> list[str]:
    """Names of the adapters packed into a bundle that is there already."""
    from edgellm_ros.bundle import Bundle
    from edgellm_ros.errors import BundleError
    from edgellm_ros.manifest import MANIFEST

    if not (output / MANIFEST).is_file():
        return []
    try:
        return sorted(Bundle.open(output, verify=False).manifest.loras)
    except BundleError:  # it is damaged or newer, and what it held unknown
        return []
