"""Thousands of short requests through the engine: do answers stay the same, and does memory stay where it is?

    python3 bench/bench_soak.py --bundle B --requests 10000          (or --shape llama-1b --weights int4-fp8)

A robot that asks every second sends 1,800 requests in half an hour; this sends them as fast as they are answered, from
more callers than there are slots: greedy, sampled, penalised, with log-probabilities, in sessions, with shared
beginnings, a tenth of them cancelled. Every answer is compared with the first one to the same request.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from gpu_or_exit import load_module, run_script  # noqa: E402

from edgellm_ros.benchmark.random_bundle import SCHEMES, SHAPES, RandomBundle  # noqa: E402
from edgellm_ros.benchmark.soak import make_requests, soak  # noqa: E402
from edgellm_ros.config import EngineConfig  # noqa: E402
from edgellm_ros.errors import ConfigError  # noqa: E402
from edgellm_ros.executors.cuda import CudaExecutor  # noqa: E402
from edgellm_ros.llm import LLM  # noqa: E402


def main() -> int:
    """Soak, print what was seen, and fail on an error, a different answer or growing memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="a bundle's directory; otherwise random weights of --shape on a GPU")
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--weights", choices=SCHEMES, default="int4-fp8")
    parser.add_argument("--requests", type=int, default=3600)
    parser.add_argument("--different", type=int, default=64, help="requests to draw from")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--callers", type=int, default=8)
    options = parser.parse_args()
    # None of any would pass without an answer; prompts have up to half of the context, and at least 4 tokens.
    for name, least in {"requests": 1, "different": 1, "callers": 1, "context": 16}.items():
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} {getattr(options, name)}: allowed is {least} and more")
    config = EngineConfig(max_slots=options.slots, max_context=options.context, max_queue=options.callers)
    if options.bundle:
        llm = LLM.open(options.bundle, config)
    else:
        load_module()
        bundle = RandomBundle(options.shape, options.weights)
        llm = LLM(bundle, config, CudaExecutor(bundle, config))
    on_gpu = llm.info.name == "cuda"
    device = load_module().device_info if on_gpu else None

    def device_bytes() -> int:
        if device is None:
            return 0
        info = device()
        return int(info["total_bytes"] - info["free_bytes"])

    with llm:
        vocab = llm.bundle.manifest.model.vocab_size
        requests = make_requests(options.different, vocab, options.context)
        report = soak(llm, requests, options.requests, options.callers, device_bytes)
    host, used = report.growth()
    where = device()["name"] if device is not None else "CPU"
    print(f"{where}, {llm.bundle.manifest.model.name}, {options.slots} slots, {options.callers} callers")
    print(f"{report.num_requests} requests ({report.num_requests / 1800:.1f} half hours of one a second), "
          f"{report.num_tokens} tokens in {report.seconds:.0f} s; ended by {dict(report.finish_reasons)}")  # fmt: skip
    for second, count, resident, taken in report.samples[:: max(1, len(report.samples) // 8)]:
        print(f"  {second:6.0f} s {count:7} requests  resident {resident / 1e6:8.1f} MB  device {taken / 1e6:9.1f} MB")
    print(f"errors {len(report.errors)}, different answers {len(report.different)}, growth after the first quarter: "
          f"resident {host / 1e6:+.1f} MB, device {used / 1e6:+.1f} MB")  # fmt: skip
    for error in report.errors[:5]:
        print(f"  {error}")
    return int(bool(report.errors or report.different or used > 0 or host > 32e6))


if __name__ == "__main__":
    run_script(main)
