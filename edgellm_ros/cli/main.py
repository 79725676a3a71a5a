"""The `edgellm` command: picks the verb, and decides what an error looks like and which exit code it has.

What is imported, is imported inside of `main`: Ctrl-C while a slow disk still reads our files is no traceback either.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from types import ModuleType

EPILOG = """\
from a checkpoint to an answer:
  edgellm export path/to/SmolLM2-135M-Instruct -o smollm2    make a bundle (once, on a workstation)
  edgellm verify smollm2 --against path/to/SmolLM2-135M-Instruct    see what it lost
  edgellm inspect smollm2                                    see what is in it
  edgellm chat smollm2                                       talk to it
  edgellm run --bundle smollm2 --input-file in.json --output-file out.json
  edgellm bench --bundle smollm2                             see how fast it is here
  edgellm plan --bundle smollm2 --device orin-nano           does it fit the robot?
  ros2 launch edgellm_ros llm.launch.py bundle:=smollm2      serve it over ROS 2

exit codes: 0 done, 1 no (verify, export --verify: a mark not reached; plan: does not fit; doctor: something is wrong)
            or an unexpected failure, 2 a mistake that the message explains, 130 interrupted
`edgellm VERB --help` shows the options of a verb; `edgellm doctor` says what this machine lacks.
"""


def verbs() -> tuple[ModuleType, ...]:
    """The module of each verb, in the order of --help."""
    from edgellm_ros.cli import (
        bench,
        build,
        chat,
        doctor,
        export,
        inspect,
        lora,
        plan,
        quantize,
        reduce_vocab,
        run,
        tune,
        verify,
    )

    return (quantize, export, reduce_vocab, lora, verify, build, inspect, run, chat, bench, tune, plan, doctor)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; importing nothing that is slow."""
    import argparse

    from edgellm_ros import __version__
    from edgellm_ros.cli.options import FORMATTER

    parser = argparse.ArgumentParser(
        prog="edgellm", description="Run a language model on a robot.", epilog=EPILOG, formatter_class=FORMATTER
    )
    parser.add_argument("--version", action="version", version=f"edgellm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("-v", "--verbose", action="store_true", help="say which executor was chosen and what it plans")
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in verbs():
        verb = commands.add_parser(
            module.__name__.rpartition(".")[2].replace("_", "-"),
            help=module.HELP,
            description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=module.EXAMPLES,
            formatter_class=FORMATTER,
        )
        for option in (("--debug",), ("-v", "--verbose")):
            verb.add_argument(*option, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        verb.set_defaults(execute=module.execute)
        module.configure(verb)
    return parser


def _tolerate_terminal() -> None:
    """A character that the terminal's encoding lacks is escaped: it must not cost what took minutes to make."""
    import io

    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() not in ("utf-8", "utf8"):
        sys.stdout.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; the entry point of `edgellm`."""
    try:
        if sys.stdout is None:  # closed: a file that is opened next would get its number, and what is printed
            print("error: standard output is closed; send it to a file or to /dev/null", file=sys.stderr)
            return 2
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return 130


def _run(argv: Sequence[str]) -> int:
    import logging
    import shlex
    import traceback

    from edgellm_ros.errors import EdgeLLMError

    _tolerate_terminal()
    args = build_parser().parse_args(argv)
    args.command = shlex.join(["edgellm", *argv])
    if args.verbose:
        logging.basicConfig(stream=sys.stderr, format="%(message)s")
        logging.getLogger("edgellm_ros").setLevel(logging.INFO)
    try:
        code: int = args.execute(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader (head, less) went away; nothing can be said to it
        sys.stdout = None
        return 1
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        expected = isinstance(error, EdgeLLMError)
        message = str(error) if expected or isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError):
            message = f"the package {error.name} is not installed; `edgellm doctor` says how to get it"
        if isinstance(error, AttributeError) and "_native" in message:  # a checkout moved on, its module did not
            message = f"{message}: the native module is older than the Python files; make native builds it again"
        if isinstance(error, PermissionError) and error.filename is not None:
            expected, message = True, f"{error.filename}: {error.strerror}; let this user read and write it"
        hint = "" if expected or args.debug else " (--debug shows where)"
        print(f"error: {message}{hint}", file=sys.stderr)
        return 2 if expected else 1


if __name__ == "__main__":
    sys.exit(main())
