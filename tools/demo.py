"""`make demo`: starts the llm node in a process of its own, and streams one answer from it with an action client."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time

from edgellm_ros.errors import EdgeLLMError
from edgellm_ros.ros.client import LLMClient

PROMPT = "Give me three tips for a robot that sorts laundry."


def main() -> int:
    """Print the answer as it streams, then tokens/s and time to first token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=200)
    options = parser.parse_args()
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    command = [sys.executable, "-m", "edgellm_ros.ros.llm_node", "--ros-args", "-r", "__node:=demo_llm"]
    command += ["--log-level", "warn", "-p", f"bundle:={options.bundle}"]
    print("-- starting the node demo_llm in its own process", flush=True)
    node = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        return ask(options.prompt, options.max_tokens)
    except EdgeLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        node.send_signal(signal.SIGINT)
        print(f"-- node stopped, exit status {node.wait(timeout=20)}", flush=True)


def ask(prompt: str, max_tokens: int) -> int:
    """One goal."""
    with LLMClient("demo_llm") as llm:
        wait_until_active(llm)
        print(f"-- prompt: {prompt}\n", flush=True)
        with llm.chat(prompt, max_tokens=max_tokens, temperature=0.0, repetition_penalty=1.1) as stream:
            for delta in stream:
                print(delta, end="", flush=True)
            usage = stream.result().usage
            first_ms = 1e3 * (stream.first_delta_s or 0.0)
        speed = (usage.completion_tokens - 1) / usage.decode_time if usage.decode_time else 0.0
        engine_ms = 1e3 * usage.time_to_first_token
        print(f"\n\n-- {usage.completion_tokens} tokens at {speed:.1f} tokens/s, prompt {usage.prompt_tokens} tokens")
        print(f"-- time to first token {first_ms:.1f} ms at the client, {engine_ms:.1f} ms in the engine")
    return 0


def wait_until_active(llm: LLMClient, timeout_s: float = 60.0) -> None:
    """The node answers once it has loaded the bundle."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            llm.tokenize("ready?", timeout_s=timeout_s)
            return
        except EdgeLLMError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
