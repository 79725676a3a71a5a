"""`edgellm verify`: measures a bundle against its original, shows the table, stores the verdict, fails on a mark."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from edgellm_ros.bundle import Bundle
    from edgellm_ros.quality import Quality
    from edgellm_ros.toolchain.verify.reading import CheckpointReading

HELP = "measure what a bundle lost against its original, and judge it"
EXAMPLES = """\
examples:
  edgellm verify smollm2 --against SmolLM2-135M-Instruct     the whole table, judged by the marks of its scheme
  edgellm verify smollm2-int8_sq --against SmolLM2-135M-Instruct    of a checkpoint, activations rounded as it says
  edgellm verify smollm2                                     perplexity and tasks only
  edgellm verify int4 int8 fp8 --against original/           the original is read once; a table of all at the end
  edgellm verify int4 --against original/ --cache ~/.cache/verify    and not again another day
  edgellm verify smollm2 --against original/ --text mine.txt --marks mine.yaml
  edgellm verify smollm2 --executor tensorrt                 on a robot: by the engine that was built there

Compared over one text: perplexity, KL divergence, most likely tokens, logits; and 96 tasks with one right answer. The
verdict goes into the bundle's manifest: `edgellm inspect` shows it, and loading a bundle that failed logs a warning.
Of a quantised checkpoint nothing is stored; its activations are rounded as its scales say, which of all executors only
an engine of an fp8 checkpoint does.
exit codes: 0 passed (or nothing to judge), 1 a mark was not reached, now or in a verdict of the manifest that stays,
2 a mistake that the message explains
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", nargs="+",
                        help="directory that `edgellm export` wrote, or `edgellm quantize`")  # fmt: skip
    parser.add_argument("--against", type=Path, metavar="CHECKPOINT",
                        help="the original: a Hugging Face directory or a .gguf file")  # fmt: skip
    parser.add_argument("--cache", type=Path, metavar="DIR",
                        help="keep what CHECKPOINT gave there (tokens x hidden size x 4 bytes), for the next BUNDLE of "
                        "it; found by a hash of its files, so that it is never out of date")  # fmt: skip
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to read (default: one of our own)")
    parser.add_argument("--scheme", default="", metavar="NAME", help="whose marks count (default: the bundle's scheme)")
    parser.add_argument("--marks", type=Path, metavar="FILE", help="YAML file with other marks, as quality/marks.yaml")
    parser.add_argument("--executor", choices=("onnxruntime", "cuda", "tensorrt", "auto"), default="onnxruntime",
                        help="what runs the bundle (default onnxruntime): tensorrt is the engine that was built here, "
                        "auto the one that a node would choose")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="let a failed mark through: noted, and exit code 0")


def execute(args: argparse.Namespace) -> int:
    """Measure, store, show."""
    from edgellm_ros.bundle import Bundle
    from edgellm_ros.cli.progress import shown_progress
    from edgellm_ros.errors import ToolchainError

    try:
        from edgellm_ros.toolchain.verify.reading import CheckpointReading
    except ImportError as error:
        raise ToolchainError(f"verify needs the package {error.name}; pip install 'edgellm_ros[toolchain]'") from error
    if args.cache and not args.against:
        raise ToolchainError("--cache keeps what the original gave; name it with --against")
    original = CheckpointReading(args.against, cache=args.cache) if args.against else None
    for path in args.bundle:  # that one of them is no bundle is said before minutes are spent on the others
        if not _is_checkpoint(path):
            Bundle.open(path, verify=False)
    found: dict[str, Quality] = {}
    kept = []  # verdicts of manifests that say more than what was measured now
    for path in args.bundle:
        with shown_progress() as show:
            found[str(path)] = _measure(path, original, args, show)
        print_quality(str(path), found[str(path)])
        if _is_checkpoint(path):
            continue
        bundle = Bundle.open(path, verify=False)
        if not store(bundle, found[str(path)]):  # shown before: one that cannot be written to costs no one the figures
            stored = bundle.manifest.quality
            print(f"{path}: not stored: the manifest's verdict has more figures, and stays: {stored.summary()}; "
                  "give --against to replace it")  # fmt: skip
            kept += [] if args.force else [stored]
    if len(found) > 1:
        print_summary(found)
    return 1 if any(quality.failed and not quality.accepted for quality in (*found.values(), *kept)) else 0


def _measure(
    path: Path, original: CheckpointReading | None, args: argparse.Namespace, show: Callable[[str, int, int], None]
) -> Quality:
    import dataclasses

    from edgellm_ros.bundle import Bundle
    from edgellm_ros.errors import ToolchainError
    from edgellm_ros.toolchain.verify.verify import verify_checkpoint

    options = {"text_file": args.text, "scheme": args.scheme, "marks_file": args.marks}
    if not _is_checkpoint(path):
        return measure(Bundle.open(path), show, args.force, against=original, executor=args.executor, **options)
    if original is None:
        raise ToolchainError(f"{path} is a checkpoint; name the original with --against")
    quality = verify_checkpoint(path, original, progress=show, cache=args.cache, **options)
    return dataclasses.replace(quality, accepted=args.force and bool(quality.failed))


def _is_checkpoint(path: Path) -> bool:
    from edgellm_ros.manifest import MANIFEST

    return (path / "config.json").is_file() and not (path / MANIFEST).exists()


def measure(bundle: Bundle, show: Callable[[str, int, int], None], force: bool, **options: Any) -> Quality:
    """What `verify_bundle` finds with these options; nothing is stored."""
    import dataclasses

    from edgellm_ros.errors import ToolchainError

    try:
        from edgellm_ros.toolchain.verify.verify import verify_bundle
    except ImportError as error:
        raise ToolchainError(f"verify needs the package {error.name}; pip install 'edgellm_ros[toolchain]'") from error

    quality = verify_bundle(bundle, progress=show, **options)
    return dataclasses.replace(quality, accepted=force and bool(quality.failed))


def store(bundle: Bundle, quality: Quality) -> bool:
    """Put the verdict into the manifest, unless the one there has more figures; whether that was done."""
    from edgellm_ros.toolchain.verify.verify import store_quality

    if quality.kl_divergence is None and bundle.manifest.quality.kl_divergence is not None:
        return False
    store_quality(bundle, quality)
    return True


def print_quality(title: str, quality: Quality) -> None:
    """The table and the verdict in a line."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(quality_table(title, quality))
    console.print(f"{title}: {quality.summary()}", soft_wrap=True, markup=False)


def print_summary(found: dict[str, Quality]) -> None:
    """A line for each bundle, to compare them by."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="all of them", title_justify="left")
    for name in ("", "scheme", "perplexity", "ratio", "KL", "same token", "cosine", "tasks", ""):
        table.add_column(name, justify="left" if name in ("", "scheme") else "right", overflow="fold")
    for path, quality in found.items():
        base, kl, same, cosine = (
            quality.original_perplexity, quality.kl_divergence, quality.top1_agreement, quality.cosine,
        )  # fmt: skip
        asked = quality.original_tasks_passed
        verdict = "not judged" if not quality.marks else "[bold red]FAILED[/]" if quality.failed else "[green]passed[/]"
        table.add_row(
            escape(path), escape(quality.scheme), f"{quality.perplexity:.3f}",
            "" if base is None else f"{quality.perplexity / base:.4f}", "" if kl is None else f"{kl:.4g}",
            "" if same is None else f"{same:.2%}", "" if cosine is None else f"{cosine:.5f}",
            f"{quality.tasks_passed}" + ("" if asked is None else f" / {asked}"), verdict,
        )  # fmt: skip
    Console(highlight=False).print(table)


def quality_table(title: str, quality: Quality) -> Table:
    """A line for each figure: the original's, the bundle's, its mark, and whether it is reached."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{escape(title)} as {escape(quality.scheme)}", title_justify="left")
    table.add_column("", style="bold")
    for name in (escape(quality.original) or "original", "bundle", "mark", ""):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    marks = {mark.name: mark for mark in quality.marks}

    def row(name: str, original: str, bundle: str, mark_name: str = "", shown: str = "{:g}") -> None:
        mark = marks.get(mark_name)
        sign = "≤" if mark_name.startswith("max_") else "≥"
        limit = f"{sign} {shown.format(mark.limit)}" if mark else ""
        verdict = "" if mark is None else "[green]pass[/]" if mark.passed else "[bold red]FAIL[/]"
        table.add_row(name, original, bundle, limit, verdict)

    base = quality.original_perplexity
    row("perplexity", "" if base is None else f"{base:.3f}", f"{quality.perplexity:.3f}")
    if base is not None:
        error = quality.perplexity_ratio_error
        ratio = f"{quality.perplexity / base:.4f}" + (f" ± {error:.4f}" if error is not None else "")
        row("  divided by the original's", "", ratio, "max_perplexity_ratio")
    if quality.kl_divergence is not None and quality.top1_agreement is not None:
        row("KL divergence, mean (nats)", "", f"{quality.kl_divergence:.4g}", "max_kl_divergence")
        row("  99th percentile", "", f"{quality.kl_divergence_p99:.3g}")
        row("same most likely token", "", f"{quality.top1_agreement:.2%}", "min_top1_agreement", "{:.4g}")
        row("cosine of the logits", "", f"{quality.cosine:.5f}", "min_cosine")
    table.add_section()
    asked = quality.original_tasks_passed
    row(f"tasks passed, of {quality.num_tasks}", "" if asked is None else str(asked), str(quality.tasks_passed))
    for score in quality.tasks:
        theirs = "" if score.original is None else str(score.original)
        row(f"  {score.kind.replace('_', '/')}, of {score.total}", theirs, str(score.passed))
    if "min_task_share" in marks:
        row("  share of the original's", "", f"{marks['min_task_share'].value:.2f}", "min_task_share")
    table.caption = (f"{quality.num_tokens} tokens of {escape(quality.text)} in windows of {quality.window}; "
                     f"{escape(quality.executor)}")  # fmt: skip
    table.caption_justify = "left"
    return table
