"""`edgellm reduce-vocab`: chooses the tokens that keep their row in the head, writes the map, says what it costs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm_ros.cli.inspect import human_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from edgellm_ros.toolchain.head_saving import HeadSaving
    from edgellm_ros.toolchain.reduce_vocab import Reduction

HELP = "choose the tokens that a robot needs, for a smaller and faster head"
EXAMPLES = """\
examples:
  edgellm reduce-vocab SmolLM2-135M-Instruct --corpus logs/ --size 16384 -o map.json
  edgellm reduce-vocab SmolLM2-135M-Instruct --corpus answers.txt --coverage 0.999 -o map.safetensors
  edgellm reduce-vocab SmolLM2-135M-Instruct --tokens mine.txt -o map.json        ids or tokens, one a line
  edgellm export SmolLM2-135M-Instruct -o smollm2 --vocab-map map.json            then make the bundle

Prompts may still have every token; answers can only have those that stay. Special tokens, stop ids, bytes or single
characters, digits, the chat template's and a tool call's tokens always stay, so every text can still be spelt, if with
more tokens. A corpus is what the model should say: answers in its languages, as plain text.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory with safetensors, or .gguf file")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="MAP", required=True, help=".json or .safetensors to write"
    )
    parser.add_argument("--corpus", type=Path, metavar="PATH", help="text file, or directory with text files")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="tokens that stay: a map, or ids or tokens by line")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--size", type=int, metavar="N", help="tokens to keep (rounded up to a multiple of 64)")
    goal.add_argument("--coverage", type=float, metavar="X", help="share of the corpus' tokens to keep, such as 0.999")
    parser.add_argument(
        "--weights",
        choices=("int4", "int8", "fp16", "fp32"),
        default="int4",
        help="of the export that the saving is told for (default int4)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing map")


def execute(args: argparse.Namespace) -> int:
    """Choose, write, and show the table."""
    from rich.console import Console
    from rich.progress import Progress

    from edgellm_ros.errors import ToolchainError

    try:
        from edgellm_ros.toolchain.head_saving import head_saving
        from edgellm_ros.toolchain.reduce_vocab import reduce_vocab
        from edgellm_ros.toolchain.vocab_file import check_output, write_vocab_file
    except ImportError as error:
        text = f"reduce-vocab needs the package {error.name}; pip install 'edgellm_ros[toolchain]'"
        raise ToolchainError(text) from error
    check_output(args.output)
    if args.output.exists() and not args.force:
        raise ToolchainError(f"{args.output} exists; choose another file, or let it be replaced with --force")
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("corpus", total=None, visible=args.corpus is not None)

        def show(stage: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        found = reduce_vocab(args.checkpoint, args.corpus, args.tokens, args.size, args.coverage, show)
    saving = head_saving(args.checkpoint, args.weights, len(found.vocab))
    write_vocab_file(args.output, found.vocab, found.tokenizer_sha256)
    Console(highlight=False).print(_table(args.output, args.weights, found, saving))
    return 0


def _table(output: Path, weights: str, found: Reduction, saving: HeadSaving) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(str(output)), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    vocab, corpus = found.vocab, found.corpus
    table.add_row("kept", f"{len(vocab)} of {vocab.vocab_size} tokens")
    table.add_row("must stay", f"{found.num_required}, of which (some for several reasons)")
    for why, count in found.required.items():
        table.add_row("", f"{count:>6}  {why}")
    if corpus is not None:
        skipped = f", {len(corpus.skipped)} files skipped that are not text" if corpus.skipped else ""
        text = f"{corpus.num_tokens} tokens in {corpus.num_files} files, {human_bytes(corpus.num_bytes)}{skipped}"
        table.add_row("corpus", text)
        table.add_row("covered", f"{found.covered:.4%} of its tokens")
        distinct = int((corpus.counts > 0).sum())
        lost = distinct - int((corpus.counts[vocab.token_ids] > 0).sum())
        most = ", ".join(f"{text!r} {count}x" for text, count in found.dropped)
        table.add_row(
            "left out", f"{lost} of its {distinct} distinct tokens" + (f"; most often {escape(most)}" if most else "")
        )
    (head, small), (step, short), (file, new) = saving.head, saving.decode_step, saving.file
    table.add_section()
    table.add_row("head", f"{human_bytes(head)} → {human_bytes(small)} ({weights} export)")
    table.add_row(
        "decode step", f"reads {human_bytes(step)} → {human_bytes(short)} of weights: {saving.decode_share:.1%} less"
    )
    change = (
        f"{human_bytes(new - file)} more: the tied head gets rows of its own"
        if new > file
        else f"{human_bytes(file - new)} less"
    )
    table.add_row("bundle", change)
    return table
