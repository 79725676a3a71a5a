"""What the ROS node costs: the same request through a real client and process, beside the engine alone in this one.

    . tools/env.sh && python bench/bench_node.py --bundle .cache/smollm2-135m-int4
    . tools/env.sh && python bench/bench_node.py --bundle .cache/smollm2-135m-int4 --executor cuda --tokens 2000

A GPU needs more tokens: deltas are gathered for a twentieth of a second, and a cancel must come before the end.

Engine and node answer in turns, so that a slow moment of the machine meets both. Speed is seen by the client: from the
first delta's arrival to the result's. Cancel latency is from the call to the node's answer, and how many tokens came
after it; growth is the node's resident memory over many short goals.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_or_exit import run_script
from rich.console import Console
from rich.progress import track
from rich.table import Table

from edgellm_ros import LLM, EngineConfig, Request, SamplingParams
from edgellm_ros.bundle import Bundle
from edgellm_ros.errors import UnsupportedError

if TYPE_CHECKING:
    from edgellm_ros.ros.client import ChatStream, LLMClient

# Words without meaning, some 440 tokens: long enough to decode well into the context.
_PROMPT = "A robot moves a red cube, a green ball and a blue cone from one table to another. " * 24


def main() -> None:
    """Run all measurements and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--executor", default="auto", choices=["auto", "onnxruntime", "cuda", "tensorrt"])
    parser.add_argument("--rounds", type=int, default=9, help="pairs of answers")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--cancels", type=int, default=20)
    parser.add_argument("--goals", type=int, default=2000, help="short goals for the memory's growth")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    try:  # not above: --help needs no ROS
        from edgellm_ros.ros.client import LLMClient
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"the Python module {error.name} is missing: no ROS 2 is sourced, or the interfaces are not built; "
            "run `make demo`, then . tools/env.sh"
        ) from error
    Bundle.open(args.bundle, verify=False)  # or the node ends, and its client waits for it
    os.environ.setdefault("ROS_DOMAIN_ID", "77")
    os.environ.setdefault("ROS_LOCALHOST_ONLY", "1")
    node = _start_node(args)
    try:
        with LLMClient(timeout_s=60.0) as client:
            rows = _speed(client, args) + _cancel(client, args) + _growth(client, node.pid, args)
    finally:
        node.send_signal(signal.SIGINT)
        node.wait(timeout=30)
    title = f"node against engine, executor {args.executor}, {args.tokens} tokens, {args.threads} threads"
    table = Table(title=f"{title}, {os.cpu_count()} cores")
    table.add_column("")
    table.add_column("measured", justify="right")
    table.add_column("wanted", justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)


def _start_node(args: argparse.Namespace) -> subprocess.Popen[bytes]:
    engine = {"engine.executor": args.executor, "engine.max_slots": 1, "engine.max_context": _context(args)}
    parameters = {"bundle": args.bundle, **engine, "engine.num_threads": args.threads}
    command = [sys.executable, "-m", "edgellm_ros.ros.llm_node", "--ros-args", "--log-level", "warn"]
    for name, value in parameters.items():
        command += ["-p", f"{name}:={value}"]
    return subprocess.Popen(command)


def _context(args: argparse.Namespace) -> int:
    """Tokens of a slot: the prompt's and the answer's."""
    return max(1024, args.tokens + 600)


def _speed(client: LLMClient, args: argparse.Namespace) -> list[tuple[str, str, str]]:
    options = {"max_tokens": args.tokens, "temperature": 0.0, "ignore_eos": True}
    sampling = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
    config = EngineConfig(
        executor=args.executor, max_slots=1, max_context=_context(args), num_threads=args.threads, prefix_cache=False
    )
    ratios, own, extra = [], [], []
    with LLM.open(args.bundle, config) as llm:
        for index in track(range(args.rounds + 1), "speed", transient=True):
            prompt = f"{index}. {_PROMPT}"  # differs from its start: no prefix of the last one can be reused
            engine = llm.complete(Request(prompt=prompt, sampling=sampling))
            engine_tps = (engine.usage.completion_tokens - 1) / engine.usage.decode_s
            stream = client.chat(prompt, raw_prompt=True, **options)
            stamps = [time.perf_counter() for _ in stream]
            result = stream.result(60.0)
            if not index:
                continue  # both warm up
            seen_tps = (result.usage.completion_tokens - 1) / (stamps[-1] - stamps[0])
            ratios.append(seen_tps / engine_tps)
            own.append(engine_tps)
            assert stream.first_delta_s is not None
            extra.append(1e3 * (stream.first_delta_s - result.usage.time_to_first_token))
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    return [
        ("engine alone, decode", f"{statistics.median(own):.0f} tokens/s", ""),
        ("client's speed over the engine's", f"{statistics.median(ratios):.3f} ({spread})", "at least 0.96"),
        (
            "goal to first delta over time to first token",
            f"{statistics.median(extra):.1f} ms (most {max(extra):.1f})",
            "at most 5 ms",
        ),
    ]


def _cancel(client: LLMClient, args: argparse.Namespace) -> list[tuple[str, str, str]]:
    answered, late = [], []
    for _ in track(range(args.cancels), "cancel", transient=True):
        length = max(400, args.tokens)
        stream = client.chat(_PROMPT, raw_prompt=True, max_tokens=length, temperature=0.0, ignore_eos=True)
        for _count, _text in zip(range(4), stream, strict=False):
            pass
        seconds = _time_cancel(stream)
        asked = time.perf_counter()
        result = stream.result(30.0)
        answered.append(1e3 * seconds)
        late.append(1e3 * (time.perf_counter() - asked))
        assert result.finish_reason == "cancelled", result.finish_reason
    return [
        (
            "cancel to the node's answer",
            f"{statistics.median(answered):.1f} ms (most {max(answered):.1f})",
            "at most 5 ms",
        ),
        ("answer to result", f"{statistics.median(late):.1f} ms (most {max(late):.1f})", "a token or two"),
    ]


def _time_cancel(stream: ChatStream) -> float:
    """Seconds from the cancel call to its response, on the client's own action handle and thread."""
    done = threading.Event()
    started = time.perf_counter()
    stream._sender.send(lambda: stream._handle.cancel_goal_async().add_done_callback(lambda _: done.set()))
    assert done.wait(10.0), "no answer to a cancel"
    return time.perf_counter() - started


def _growth(client: LLMClient, pid: int, args: argparse.Namespace) -> list[tuple[str, str, str]]:
    def resident_mb() -> float:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(status["VmRSS"].split()[0]) / 1e3

    for _ in range(100):
        client.generate("hi", timeout_s=30.0, max_tokens=2)
    before = resident_mb()
    for _ in track(range(args.goals), "goals", transient=True):
        client.generate("hi", timeout_s=30.0, max_tokens=2)
    after = resident_mb()
    return [
        ("node's resident memory", f"{after:.0f} MB", "under 400 MB"),
        (f"growth over {args.goals} goals", f"{after - before:+.1f} MB", "none"),
    ]


if __name__ == "__main__":
    run_script(main)
