"""`edgellm chat`: a conversation on the terminal that streams; or one line in, one answer out, when piped."""

from __future__ import annotations

import argparse
from pathlib import Path

from edgellm_ros.cli.options import add_settings, settings_from
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import SamplingParams

HELP = "talk to a bundle on the terminal"
EXAMPLES = """\
examples:
  edgellm chat smollm2
  edgellm chat smollm2 --temperature 0 --system "You answer in one sentence."
  echo "What is ROS 2?" | edgellm chat smollm2        only the answer goes to standard output
  edgellm chat smollm2 --lora pick                    with an adapter that `edgellm lora pack` put into the bundle

Ctrl-C stops the answer, Ctrl-D or /exit leaves, /reset forgets the conversation, and /system TEXT changes the
system prompt.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory that `edgellm export` wrote")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt (default: the template's own)")
    parser.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let a reasoning model think first (default: the template's own)",
    )
    parser.add_argument(
        "--stats",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show tokens/s after an answer (default on)",
    )
    parser.add_argument("--lora", default="", metavar="NAME", help="adapter of the bundle to talk to")
    add_settings(parser, SamplingParams, "sampling")
    add_settings(parser, EngineConfig, "engine", skip=("max_slots", "loras"))


def execute(args: argparse.Namespace) -> int:
    """Load the bundle and talk until the input ends."""
    from dataclasses import replace

    from edgellm_ros.cli.terminal import Terminal, talk
    from edgellm_ros.llm import LLM

    sampling = settings_from(args, SamplingParams())
    config = replace(settings_from(args, EngineConfig()), max_slots=1)
    with LLM.open(args.bundle, config, loras=[args.lora] if args.lora else []) as llm:
        talk(llm, Terminal(stats=args.stats), sampling, args.system, args.think, args.lora)
    return 0
