"""`edgellm bench`: how fast a bundle, or a published shape with random weights, runs on this machine."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_ros.benchmark.shapes import SCHEME_FIELDS, SHAPE_FIELDS
from edgellm_ros.cli.options import add_settings, settings_from, was_given
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import SamplingParams
from edgellm_ros.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from edgellm_ros.benchmark.measure import Benchmark, Plan
    from edgellm_ros.bundle import Bundle

HELP = "measure how fast a bundle, or a model's shape with random weights, runs here"
EXAMPLES = """\
examples:
  edgellm bench --bundle smollm2                                       prompt of 512, 128 new tokens, 5 rounds
  edgellm bench --bundle smollm2 --prompt-tokens 128 512 2048 --context 512 4096
  edgellm bench --bundle smollm2 --plot speed.svg                      tokens/s against context, 512 to capacity
  edgellm bench --bundle smollm2 --json - --rounds 9                   for a script
  edgellm bench --bundle smollm2 --compare onnxruntime cuda            both, with the ratio
  edgellm bench --shape llama-8b --weights int4 --batch 1 8            no download: random weights, on a GPU

Two figures stand side by side: "executor" is the model alone, "engine" what a caller gets, with scheduling, sampling,
text and streaming. GB/s are the weights and the KV cache that a step reads, over its time; "of read" is that in
relation to what a program that only reads reaches here, measured in the same run. Ctrl-C, and an error, show what there
is so far. Numbers of a busy machine are too low: the output says so.
"""
_COMPARABLE = ("onnxruntime", "cuda", "tensorrt")
_ENGINE_SKIPPED = ("max_slots", "max_queue", "prefix_cache", "pinned_tokens", "loras")  # given by what is measured
_BUNDLES_ONLY = ("verify_files", "self_test")  # random weights have neither files nor logits to compare with
_SAMPLING_USED = ("temperature", "top_k", "top_p", "min_p")
_CONTEXT = "Tokens a slot can hold, prompt and answer together; 0, the default, is as many as what is measured needs."
_DEFAULT_PROMPT = 512
_DEFAULT_LIMIT = 4096  # of a plot's contexts, when neither --context nor --max-context says more


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--bundle", type=Path, metavar="BUNDLE", help="directory that `edgellm export` wrote")
    model.add_argument("--shape", choices=tuple(SHAPE_FIELDS), help="this model's shape, with random weights")
    parser.add_argument("--weights", choices=tuple(SCHEME_FIELDS), help="weights of a --shape (default bf16)")
    parser.add_argument(
        "--prompt-tokens", type=int, nargs="+", metavar="N", help="prompt lengths (default 512, or what fits)"
    )
    parser.add_argument(
        "--context",
        type=int,
        nargs="+",
        metavar="N",
        help="tokens in the KV cache before decoding (default: the prompt's; with --plot 512 to capacity)",
    )
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N", help="tokens to decode (default 128)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N", help="sequences (default 1)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each figure (default 5)")
    parser.add_argument(
        "--compare",
        nargs="+",
        choices=_COMPARABLE,
        metavar="EXECUTOR",
        help=f"measure several executors in turn ({', '.join(_COMPARABLE)}); ratios are to the first",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything measured as JSON; - is standard output")
    parser.add_argument("--plot", metavar="FILE", help="draw tokens/s against context: .svg or .png")
    unused = [name for name in SamplingParams.__dataclass_fields__ if name not in _SAMPLING_USED]
    add_settings(parser, SamplingParams, "sampling (through the engine)", skip=unused)
    add_settings(parser, EngineConfig, "engine", skip=_ENGINE_SKIPPED, helps={"max_context": _CONTEXT})


def execute(args: argparse.Namespace) -> int:
    """Check everything, measure, and show it."""
    from rich.console import Console

    from edgellm_ros.benchmark.measure import Benchmark
    from edgellm_ros.benchmark.plot import check_plot, write_plot
    from edgellm_ros.benchmark.report import begin_report, print_report

    _check_counts(args)
    plot = None if args.plot is None else _target("--plot", args.plot)
    if plot is not None:
        check_plot(plot)
    file = None if args.json in (None, "-") else _target("--json", args.json)
    if plot is not None and file is not None and _is_same(plot, file):
        raise ConfigError(f"--json {args.json} and --plot {args.plot} are one file; name two")
    executors = _executors(args)
    bundle, source = _open(args, executors)
    plan = _plan(args, executors, bundle)
    benchmark = Benchmark(bundle, source, plan)
    if "cuda" in executors:
        _require_gpu(args, bundle)
    if "tensorrt" in executors:
        _require_engine(args, bundle, benchmark.capacity)
    report = begin_report(args.command, bundle, plan)
    failure: Exception | None = None
    try:
        _measure(benchmark, plan)
        report["complete"] = True
    except KeyboardInterrupt:
        if not benchmark.runs:
            raise
        report["stopped_by"] = "Ctrl-C"
    except Exception as error:  # of a later run: what the earlier ones took minutes for is shown first
        if isinstance(error, ConfigError) and "max_slots" in str(error):
            error = ConfigError(f"{error}; --batch is max_slots here")
        if not any(run.has_figures for run in benchmark.runs):
            raise error from None
        failure, report["stopped_by"] = error, str(error)
    report["runs"] = [run.to_dict() for run in benchmark.runs]
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    else:
        print_report(report, Console(highlight=False))
        if file is not None:
            file.write_text(text, encoding="utf-8")
    if plot is not None:
        write_plot(report, plot)
    if failure is not None:
        raise failure
    return 0 if report["complete"] else 130


def _measure(benchmark: Benchmark, plan: Plan) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.description}", markup=False), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=plan.num_units)
        begun = 0

        def show(words: str) -> None:
            nonlocal begun
            progress.update(task, description=words, completed=begun)
            begun += 1

        benchmark.measure(show)


def _target(option: str, name: str) -> Path:
    """The file of that name; refuses now what could not be written after minutes of measuring."""
    if not name:  # which Path takes for the directory that this is started in
        raise ConfigError(f"{option} is empty; name a file")
    path = Path(name)
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a directory; name a file in it")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no directory {path.parent}; make it first")
    try:
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():  # what exists and is no file, as a pipe, is left to the one who named it
            with tempfile.TemporaryFile(dir=path.absolute().parent):
                pass
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written ({error.strerror}); name another file") from error
    return path


def _is_same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


def _check_counts(args: argparse.Namespace) -> None:
    limits: dict[str, tuple[Any, int, int]] = {
        "--prompt-tokens": (args.prompt_tokens, 2, 2**20),
        "--context": (args.context, 2, 2**20),
        "--new-tokens": ([args.new_tokens], 2, 2**16),
        "--batch": (args.batch, 1, 64),
        "--rounds": ([args.rounds], 1, 1000),
    }
    for option, (values, low, high) in limits.items():
        for value in values or ():
            if not low <= value <= high:
                raise ConfigError(f"{option} {value}: allowed is {low} to {high}")


def _executors(args: argparse.Namespace) -> tuple[str, ...]:
    if args.compare:
        if was_given(args, EngineConfig, "executor"):
            raise ConfigError("--compare names the executors already; leave --executor out")
        return tuple(dict.fromkeys(args.compare))
    named = settings_from(args, EngineConfig()).executor
    return ("cuda",) if args.shape and named == "auto" else (named,)


def _open(args: argparse.Namespace, executors: tuple[str, ...]) -> tuple[Bundle, Path | Bundle]:
    """The bundle, and what to load it from; no GPU is looked for."""
    from edgellm_ros.benchmark.random_bundle import RandomBundle
    from edgellm_ros.bundle import Bundle

    if args.bundle is not None:
        if args.weights is not None:
            raise ConfigError(f"--weights {args.weights} goes with --shape; a bundle has its own weights, see inspect")
        return Bundle.open(args.bundle, verify=False), args.bundle  # loading verifies it
    config = settings_from(args, EngineConfig())
    for name in _BUNDLES_ONLY:
        if was_given(args, EngineConfig, name):
            option = f"--{'' if getattr(config, name) else 'no-'}{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} goes with --bundle; --shape {args.shape} is random weights, which have neither files nor a "
                "self-test: leave it out"
            )
    others = [name for name in executors if name != "cuda"]
    if others:
        raise UnsupportedError(
            f"executor is {others[0]!r}: --shape {args.shape} is random weights without an ONNX graph, which only cuda "
            "runs; use --executor cuda, or --bundle with an exported model"
        )
    random = RandomBundle(args.shape, args.weights or "bf16")
    return random, random


def _require_gpu(args: argparse.Namespace, bundle: Bundle) -> None:
    """Raise UnsupportedError where the cuda executor cannot run `bundle`; after all that is wrong on any machine."""
    from edgellm_ros import native
    from edgellm_ros.executors.cuda import unsupported_reason

    reason = native.unavailable_reason() or unsupported_reason(bundle)
    if reason and args.bundle is not None:
        raise UnsupportedError(f"executor is 'cuda': {reason}; use onnxruntime or auto")
    if reason:
        raise UnsupportedError(
            f"--shape {args.shape} is random weights without an ONNX graph, which only the cuda executor runs: "
            f"{reason}; use --bundle with an exported model on a CPU"
        )


def _require_engine(args: argparse.Namespace, bundle: Bundle, capacity: int) -> None:
    """Raise UnsupportedError now where no engine would be loaded, and not after another executor's minutes."""
    from edgellm_ros.executors.engine_preflight import choose_engine, probe_machine

    config = replace(settings_from(args, EngineConfig()), max_slots=max(args.batch), max_context=capacity)
    engine, reasons = choose_engine(bundle, config, probe_machine())
    if engine is None:
        raise UnsupportedError(f"executor is 'tensorrt': {'; '.join(reasons)}; or use auto")


def _plan(args: argparse.Namespace, executors: tuple[str, ...], bundle: Bundle) -> Plan:
    from edgellm_ros.benchmark.measure import Plan, check_batches, tokens_needed

    config = settings_from(args, EngineConfig())
    batches = tuple(sorted(set(args.batch)))
    for executor in executors:
        check_batches(batches, _likely(executor, bundle))
    limit = config.max_context or bundle.manifest.model.max_context
    room = limit - tokens_needed(0, args.new_tokens, batches[-1])
    if room < 2:
        raise ConfigError(
            f"--new-tokens {args.new_tokens} and --batch {batches[-1]} leave no room for a prompt in {limit} tokens; "
            "lower them"
        )
    prompts = args.prompt_tokens or [min(_DEFAULT_PROMPT, room)]
    if args.context:
        contexts = args.context
    elif args.plot is not None:
        shorter = _DEFAULT_LIMIT - (limit - room)
        contexts = _doubling(room if config.max_context or shorter < 2 else min(room, shorter))
    else:
        contexts = prompts
    sampling = replace(settings_from(args, SamplingParams()), seed=0, ignore_eos=True)
    return Plan(
        executors, tuple(sorted(set(prompts))), tuple(sorted(set(contexts))), batches, args.new_tokens, args.rounds,
        config, sampling,
    )  # fmt: skip


def _likely(executor: str, bundle: Bundle) -> str:
    """The executor that auto will choose, as far as can be said before loading: of the GPU's two both are alike."""
    from edgellm_ros import native
    from edgellm_ros.executors.cuda import unsupported_reason

    if executor != "auto" or native.unavailable_reason() or unsupported_reason(bundle):
        return executor
    return "cuda"


def _doubling(longest: int) -> list[int]:
    """Contexts for a plot: 512, 1,024 and so on, then the longest; smaller ones where the context is small."""
    contexts, context = [], min(_DEFAULT_PROMPT, max(longest // 4, 2))
    while context < 0.9 * longest:
        contexts.append(context)
        context *= 2
    return [*contexts, longest]
