"""`edgellm lora`: shows what a PEFT adapter changes, merges it into a checkpoint, or packs it into a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm_ros.cli.inspect import human_bytes
from edgellm_ros.cli.options import FORMATTER

if TYPE_CHECKING:
    from edgellm_ros.bundle import Bundle
    from edgellm_ros.executors.lora import LoraAdapter

HELP = "check, merge or pack a LoRA adapter"
EXAMPLES = """\
examples:
  edgellm lora check my-adapter                              what it changes, and how strongly
  edgellm lora check my-adapter --bundle smollm2             and whether it belongs to that bundle
  edgellm lora pack my-adapter --bundle smollm2 --name pick    into it: each request may name it
  edgellm lora merge SmolLM2-135M-Instruct my-adapter -o merged    for good, into a checkpoint to export

An adapter is a directory as PEFT's save_pretrained writes it. Packed adapters are switched from request to request
and cost a little with each token; a merged one costs nothing and cannot be taken out. Adapters may change q, k, v, o,
gate, up and down projections, also stacked ones, with any rank to 64; a changed head or embedding, DoRA and biases are
refused by name.
"""
_ADAPTER = "directory with adapter_config.json and adapter_model.safetensors"
_ANY_BASE = "accept an adapter that names another base model, if its shapes fit"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the three commands of this verb."""
    commands = parser.add_subparsers(dest="lora_command", metavar="COMMAND", required=True)

    def command(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=what, description=what[0].upper() + what[1:] + ".", formatter_class=FORMATTER
        )

    check = command("check", "show what an adapter changes, and whether it belongs to a bundle")
    check.add_argument("adapter", type=Path, metavar="ADAPTER", help=_ADAPTER)
    check.add_argument("--bundle", type=Path, metavar="BUNDLE", help="refuse an adapter that does not belong to it")
    merge = command("merge", "write a checkpoint with the adapter added to its weights")
    merge.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="Hugging Face directory with safetensors")
    merge.add_argument("adapter", type=Path, metavar="ADAPTER", help=_ADAPTER)
    merge.add_argument("-o", "--output", type=Path, metavar="DIR", required=True, help="checkpoint to write")
    pack = command("pack", "put an adapter into a bundle, for requests to name")
    pack.add_argument("adapter", type=Path, metavar="ADAPTER", help=_ADAPTER)
    pack.add_argument("--bundle", type=Path, metavar="BUNDLE", required=True, help="bundle to put it into")
    pack.add_argument("--name", default="", help="what requests call it (default: the directory's name)")
    for one in (check, merge, pack):
        one.add_argument("--any-base", action="store_true", help=_ANY_BASE)
    for one, what in ((merge, "checkpoint"), (pack, "adapter of that name")):
        one.add_argument("--force", action="store_true", help=f"replace an existing {what}")


def execute(args: argparse.Namespace) -> int:
    """Run the command that was named."""
    return {"check": _check, "merge": _merge, "pack": _pack}[args.lora_command](args)


def _check(args: argparse.Namespace) -> int:
    from edgellm_ros.bundle import Bundle
    from edgellm_ros.executors.lora import read_adapter
    from edgellm_ros.toolchain.lora import check_for_bundle

    bundle = Bundle.open(args.bundle, verify=False) if args.bundle else None
    adapter = read_adapter(args.adapter)
    if bundle is not None:
        check_for_bundle(adapter, bundle, args.any_base)
    _show(args.adapter, adapter, bundle)
    return 0


def _merge(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from edgellm_ros.errors import ToolchainError

    try:
        from edgellm_ros.toolchain.lora_merge import merge_adapter
    except ModuleNotFoundError as error:
        text = f"lora merge needs the package {error.name}; pip install 'edgellm_ros[toolchain]'"
        raise ToolchainError(text) from error
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("merge", total=None)

        def show(stage: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        count = merge_adapter(args.checkpoint, args.adapter, args.output, args.any_base, args.force, show)
    print(f"{args.output}: {count} tensors changed; `edgellm export {args.output} -o BUNDLE` makes a bundle of it")
    return 0


def _pack(args: argparse.Namespace) -> int:
    from edgellm_ros.bundle import Bundle
    from edgellm_ros.toolchain.lora import pack_adapter

    bundle = Bundle.open(args.bundle, verify=False)
    adapter, bundle = pack_adapter(args.adapter, bundle, args.name, args.any_base, args.force)
    name = args.name or args.adapter.resolve().name
    _show(args.adapter, adapter, bundle)
    size = bundle.manifest.files[bundle.lora_key(name)].size
    print(f"packed as {name!r}: {bundle.path / bundle.lora_key(name)}, {human_bytes(size)}")
    if not bundle.manifest.graph.max_lora_rank:
        print("only the cuda executor runs it in this bundle; for the others export it again with --max-lora-rank")
    return 0


def _show(path: Path, adapter: LoraAdapter, bundle: Bundle | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from edgellm_ros.toolchain.lora import modules_of

    rows = modules_of(adapter)
    table = Table(title=escape(str(path)), title_justify="left")
    for heading in ("module", "layers", "rank", "alpha", "scale", "parameters"):
        table.add_column(heading, justify="left" if heading == "module" else "right")
    for row in rows:
        table.add_row(
            row.target,
            _layers(row.layers),
            _several(row.ranks),
            _several(row.alphas),
            _several(row.scales),
            f"{row.parameters:,}",
        )
    Console(highlight=False).print(table)
    total = sum(row.parameters for row in rows)
    print(f"{total:,} parameters, {human_bytes(4 * total)} in fp32{', rslora' if adapter.rslora else ''}")
    print(f"trained on {adapter.base or 'a base that it does not name'}")
    if bundle is not None:
        print(f"fits {bundle.path} ({bundle.manifest.model.name})")


def _layers(layers: tuple[int, ...]) -> str:
    first, last = layers[0], layers[-1]
    whole = len(layers) == last - first + 1
    return (f"{first} to {last}" if first != last else str(first)) if whole else f"{len(layers)} of {first} to {last}"


def _several(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
