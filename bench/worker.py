"""One engine, one process, one measurement: loads a model, answers a fixed prompt a few times, prints JSON.

Started by compare_llama_cpp.py. Prompts are random token ids, fresh for each round, so that no engine can reuse the
one before; both draw greedily, never stop early, and are driven through their own public Python interface.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from gpu_or_exit import run_script


def main() -> None:
    """Measure one engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=("edgellm", "llama.cpp"))
    parser.add_argument("model", help="a bundle directory, or a GGUF file for llama.cpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    measure = _edgellm if args.engine == "edgellm" else _llama_cpp
    print(json.dumps(measure(args)))


def _prompts(args: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(args.seed)
    return [rng.integers(100, vocab_size, args.prompt).tolist() for _ in range(args.rounds)]


def _edgellm(args: argparse.Namespace) -> dict[str, object]:
    from edgellm_ros import LLM, EngineConfig, Request, SamplingParams

    config = EngineConfig(max_slots=1, max_context=args.prompt + args.tokens + 16, num_threads=args.threads)
    started = time.perf_counter()
    llm = LLM.open(args.model, config)
    load_s = time.perf_counter() - started
    sampling = SamplingParams(temperature=0.0, max_tokens=args.tokens + 1, ignore_eos=True)
    prefill, decode = [], []
    for prompt in _prompts(args, llm.info.vocab_size):
        stamps = []
        started = time.perf_counter()
        for delta in llm.generate(Request(prompt_ids=tuple(prompt), sampling=sampling)):
            stamps += [time.perf_counter()] * len(delta.token_ids)
        prefill.append(args.prompt / (stamps[0] - started))
        decode.append(args.tokens / (stamps[-1] - stamps[0]))
    memory = _resident_mb()
    llm.close()
    return {"load_s": load_s, "prefill": prefill, "decode": decode, **memory}


def _llama_cpp(args: argparse.Namespace) -> dict[str, object]:
    from llama_cpp import Llama

    started = time.perf_counter()
    llama = Llama(
        args.model, n_ctx=args.prompt + args.tokens + 16, n_threads=args.threads, n_threads_batch=args.threads,
        n_batch=512, n_ubatch=512, verbose=False,
    )  # fmt: skip
    load_s = time.perf_counter() - started
    prefill, decode = [], []
    for prompt in _prompts(args, llama.n_vocab()):
        started = time.perf_counter()
        stamps = []
        for _ in llama.generate(prompt, temp=0.0, reset=True):
            stamps.append(time.perf_counter())
            if len(stamps) > args.tokens:
                break
        prefill.append(args.prompt / (stamps[0] - started))
        decode.append(args.tokens / (stamps[-1] - stamps[0]))
    return {"load_s": load_s, "prefill": prefill, "decode": decode, **_resident_mb()}


def _resident_mb() -> dict[str, float]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(status[name].split()[0]) / 1e3 for key, name in (("rss_mb", "VmRSS"), ("peak_mb", "VmHWM"))}


if __name__ == "__main__":
    run_script(main)
