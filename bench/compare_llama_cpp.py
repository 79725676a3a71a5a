"""Compares the CPU executor with llama.cpp: same weights, same threads, in turns within one run.

    python bench/compare_llama_cpp.py --bundle .cache/smollm2-135m-int4 --gguf .cache/SmolLM2-135M-Instruct.Q4_1.gguf

llama.cpp (through llama-cpp-python, `pip install llama-cpp-python`) gets a Q4_0 file that its own quantiser makes from
the GGUF the bundle was exported from. Each round starts both in processes of their own, one after the other, so that
a slow moment of the machine meets both; the ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_or_exit import run_script
from rich.console import Console
from rich.table import Table

from edgellm_ros.bundle import Bundle
from edgellm_ros.errors import ConfigError, ToolchainError

_WORKER = Path(__file__).with_name("worker.py")


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--gguf", required=True, help="the GGUF file that the bundle was exported from")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of processes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", help="write every measurement to this file")
    args = parser.parse_args()
    Bundle.open(args.bundle, verify=False)  # the worker verifies it, and only after the peer was made
    peer = _make_q4_0(Path(args.gguf))
    results: dict[str, list[dict[str, Any]]] = {"edgellm": [], "llama.cpp": []}
    for index in range(args.rounds):
        for engine, model in (("edgellm", args.bundle), ("llama.cpp", str(peer))):
            results[engine].append(_measure(engine, model, args, index))
            last = results[engine][-1]
            print(
                f"round {index + 1}: {engine}: decode {statistics.median(last['decode']):.0f} tokens/s", file=sys.stderr
            )
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    _print_table(results, args)


def _measure(engine: str, model: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    command = [sys.executable, str(_WORKER), engine, model, "--threads", str(args.threads), "--seed", str(seed)]
    command += ["--prompt", str(args.prompt), "--tokens", str(args.tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode < 0:  # it had no time for a line of its own
        sys.stderr.write(done.stderr)
        name = signal.Signals(-done.returncode).name
        raise ToolchainError(f"{engine}'s process was ended by {name}; build it again, or another version of it")
    if done.returncode:
        sys.stderr.write(done.stderr)  # ends with the worker's own line
        raise SystemExit(done.returncode)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _make_q4_0(source: Path) -> Path:
    import llama_cpp

    if not source.is_file():
        raise ConfigError(f"--gguf {source} is not a file; name the one that the bundle was exported from")
    target = source.with_name(f"{source.name.split('.')[0]}.Q4_0.gguf")
    if not target.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
        params.allow_requantize = True
        partial = target.with_suffix(".partial")
        if llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params)):
            raise ToolchainError(f"llama.cpp could not quantise {source}; give a GGUF file that it reads")
        partial.rename(target)
    return target


def _print_table(results: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    rows = [
        ("prefill, tokens/s", lambda r: statistics.median(r["prefill"]), "{:.0f}"),
        ("decode, tokens/s", lambda r: statistics.median(r["decode"]), "{:.0f}"),
        ("loading, s", lambda r: r["load_s"], "{:.2f}"),
        ("resident, MB", lambda r: r["rss_mb"], "{:.0f}"),
        ("peak resident, MB", lambda r: r["peak_mb"], "{:.0f}"),
    ]
    table = Table(
        title=f"{args.prompt} prompt + {args.tokens} new tokens, {args.threads} threads, {args.rounds} rounds, medians"
    )
    for column in ("", "edgellm_ros", "llama.cpp", "ratio (range)"):
        table.add_column(column, justify="left" if not column else "right")
    for name, value, form in rows:
        ours, theirs = ([value(r) for r in results[e]] for e in ("edgellm", "llama.cpp"))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(name, form.format(statistics.median(ours)), form.format(statistics.median(theirs)), spread)
    console = Console(width=100)
    console.print(table)
    import llama_cpp
    import onnxruntime

    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    console.print(
        f"{cpu or platform.machine()}, {os.cpu_count()} cores; onnxruntime {onnxruntime.__version__}, "
        f"llama-cpp-python {llama_cpp.__version__} (Q4_0 by its own quantiser)"
    )


if __name__ == "__main__":
    run_script(main)
