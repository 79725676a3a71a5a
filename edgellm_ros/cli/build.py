"""`edgellm build`: makes a TensorRT engine of a bundle for one GPU architecture, and shows its report."""

from __future__ import annotations

import argparse
from pathlib import Path

from edgellm_ros.cli.options import add_settings, settings_from
from edgellm_ros.config import BUILD_TARGETS, BuildOptions

HELP = "build a TensorRT engine of a bundle"
EXAMPLES = """\
examples:
  edgellm build smollm2                                on the robot: for its own GPU, with its TensorRT
  edgellm build smollm2 --target sm89                  anywhere, without a GPU: with TensorRT-RTX
  edgellm build smollm2 --target sm89 --lora           with adapter inputs (edgellm export --max-lora-rank)
  edgellm build smollm2 --target sm120 --max-context 2048 --max-batch 4

The engine goes to BUNDLE/engines/KEY with report.json and layers.json; a key that is there is reused. TensorRT builds
for the GPU it runs on; TensorRT-RTX (pip install 'edgellm_ros[rtx]') builds for RTX architectures, not for Jetson.
Building checks names, shapes and layers; it never executes the engine. docs/build.md says more.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory that `edgellm export` wrote")
    names = ", ".join(BUILD_TARGETS)
    parser.add_argument("--target", default="current", metavar="GPU", help=f"current (default), {names}")
    parser.add_argument("--builder", choices=("auto", "tensorrt", "tensorrt_rtx"), default="auto",
                        help="auto (default) takes tensorrt on the target itself, else tensorrt_rtx")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="build again where the key is there already")
    parser.add_argument("--ignore-memory", action="store_true",
                        help="start although memory seems short: what a build takes is an estimate")  # fmt: skip
    add_settings(parser, BuildOptions, "what the engine is built for")


def execute(args: argparse.Namespace) -> int:
    """Build, then show the report."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from edgellm_ros.bundle import Bundle
    from edgellm_ros.cli.inspect import human_bytes
    from edgellm_ros.errors import ToolchainError
    from edgellm_ros.toolchain.build.builder import build_engine
    from edgellm_ros.toolchain.build.kernels import fused_attentions

    options = settings_from(args, BuildOptions())
    bundle = Bundle.open(args.bundle)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("parsing", total=None)

            def show(phase: str, done: int, total: int) -> None:
                progress.update(task, description=phase[:48], completed=done, total=total or None)

            engine, fresh = build_engine(
                bundle, args.target, options, args.builder, args.force, show, ignore_memory=args.ignore_memory
            )
    except ModuleNotFoundError as error:
        remedy = "pip install 'onnx>=1.19' 'ml_dtypes>=0.5'"
        raise ToolchainError(f"build needs the package {error.name}; {remedy}") from error
    facts = engine.report
    print(f"{'built' if fresh else 'already there'}: {engine.path}")
    print(f"  {facts['seconds']['build']:.1f} s, peak memory {human_bytes(facts['peak_memory_bytes'])}, "
          f"engine {human_bytes(facts['engine']['size'])}")  # fmt: skip
    kinds = facts["network"]["kinds"]
    print(f"  {facts['network']['layers']} layers: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    fused = fused_attentions(facts.get("kernels", {}))
    if fused:
        print(f"  {fused} fused attention kernels, one for each layer in {len(facts['profiles'])} profiles")
    print("  built, never executed: names, shapes and layers were checked, not numbers")
    return 0
