"""Sampling on the device: microseconds a call, by vocabulary, batch and kind, beside the same on the host.

"argmax" is what greedy steps end with: the largest of the keys that the head's blocks left. "greedy" to "all" are
what most requests ask for; "wide" has a nucleus of thousands of tokens, which takes the general
selection; "everything" has penalties and the five best log-probabilities, which takes the larger kernel.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from kernel_timing import K, measure_us, print_machine, run_script, torch
from test_sampling import CASES, Device

from edgellm_ros.core import SamplingParams
from edgellm_ros.runtime.sampling import Sampler

EVERYTHING = {**CASES["all"], "repetition_penalty": 1.1, "presence_penalty": 0.2, "logprobs": 5}


def main() -> None:
    """One line a vocabulary, batch and kind."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print_machine()
    print("vocab   batch  kind           us   host us (copy of the logits included)")
    rng = np.random.default_rng(0)
    for vocab in (49152, 128256, 151936):
        for batch in (1, 8):
            logits = (rng.standard_normal((batch, vocab)) * 3).astype(np.float32)
            on_device = torch.from_numpy(logits).cuda()
            scores = torch.empty_like(on_device)
            print_greedy(vocab, batch)
            for kind in ("greedy", "plain", "top_k", "top_p", "all", "wide", "everything"):
                settings = EVERYTHING if kind == "everything" else CASES[kind]
                params = [SamplingParams(seed=s, **settings) for s in range(batch)]
                device = Device(params, vocab)
                more = (device.counts, device.bias_ids, device.bias_values, None, device.logprobs)

                def launch(stream: int) -> None:
                    extra = more if kind == "everything" else ()  # noqa: B023
                    K.sample(on_device, scores, device.rows, device.state, *extra, stream=stream)  # noqa: B023

                us = measure_us([launch] * 8)
                samplers = [Sampler(p, vocab) for p in params]
                begin = time.perf_counter()
                for _ in range(5):
                    rows = on_device.cpu().numpy()
                    for sampler, row in zip(samplers, rows, strict=True):
                        sampler.draw(row)
                host_us = (time.perf_counter() - begin) / 5 * 1e6
                print(f"{vocab:6d} {batch:6d}  {kind:10s} {us:8.1f} {host_us:9.0f}", flush=True)


def print_greedy(vocab: int, batch: int) -> None:
    """The kernel alone; the host has no counterpart to a block's keys."""
    num_blocks = -(-vocab // 64)  # as many as the head's product has with small tiles
    keys = torch.randint(1, 1 << 62, (batch, num_blocks), dtype=torch.int64, device="cuda")
    device = Device([SamplingParams(temperature=0.0)] * batch, vocab)
    us = measure_us([lambda stream: K.greedy(keys, device.state, stream=stream)] * 8)
    print(f"{vocab:6d} {batch:6d}  {'argmax':10s} {us:8.1f}", flush=True)


if __name__ == "__main__":
    run_script(main)
