"""Draft acceptance: microseconds by nodes and sampling parameters, and GB/s of the logits it reads."""

from __future__ import annotations

import argparse
import struct
from typing import Any

from kernel_timing import K, measure_us, print_machine, run_script, torch

VOCAB = 128256
CASES = {  # temperature, top_p, min_p, top_k, whether the draft's probabilities are given
    "greedy": (0.0, 1.0, 0.0, 0, False),
    "temperature": (0.8, 1.0, 0.0, 0, False),
    "top-k 40, top-p 0.95": (0.8, 0.95, 0.0, 40, False),
    "top-p 0.95": (0.8, 0.95, 0.0, 0, False),
    "temperature, p / q": (0.8, 1.0, 0.0, 0, True),
    "top-k 40, top-p 0.95, p / q": (0.8, 0.95, 0.0, 40, True),
}


def main() -> None:
    """One line a case, for chains of 4, 8, 16 and 64 nodes."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    read = print_machine()
    print(f"vocab {VOCAB}; nodes: us (GB/s of logits, share of the read bandwidth)")
    for name, case in CASES.items():
        columns = []
        for nodes in (4, 8, 16, 64):
            us = time_us(nodes, *case)
            rate = nodes * VOCAB * 4 / us * 1e-3
            columns.append(f"{nodes}: {us:.1f} ({rate:.0f}, {rate / read:.0%})")
        print(f"{name:28s} {'  '.join(columns)}", flush=True)


def time_us(nodes: int, temperature: float, top_p: float, min_p: float, top_k: int, has_probs: bool) -> float:
    """Microseconds of one call for one sequence with a chain of `nodes`, node 0 included."""
    sets = 8  # in turn, so that L2 does not hold small ones; a verification leaves its logits there, in part
    logits = [torch.randn((1, nodes, VOCAB), device="cuda") * 3 for _ in range(sets)]
    probs = [torch.softmax(x, -1) for x in logits] if has_probs else [None] * sets
    row = struct.pack("<Q6f6i", 1, temperature, top_p, min_p, 1.0, 0.0, 0.0, top_k, 0, 0, 0, -1, 0)
    rows = torch.frombuffer(bytearray(row), dtype=torch.uint8).view(1, -1).cuda()

    def ints(*shape: int) -> Any:
        return torch.zeros(shape, dtype=torch.int32, device="cuda")

    token_ids, paths, lengths, next_tokens = ints(1, nodes), ints(1, nodes), ints(1), ints(1)
    num_nodes = torch.full((1,), nodes, dtype=torch.int32, device="cuda")
    scores = torch.empty((1, nodes, VOCAB), device="cuda")
    workspace = torch.zeros(K.draft_acceptance_workspace_bytes(1, nodes), dtype=torch.uint8, device="cuda")

    def launch(index: int) -> Any:
        return lambda stream: K.accept_draft(
            logits[index % sets], token_ids, num_nodes, rows, scores, paths, lengths, next_tokens, workspace,
            draft_probs=probs[index % sets], stream=stream, pdl=index > 0,
        )  # fmt: skip

    return measure_us([launch(i) for i in range(2 * sets)])


if __name__ == "__main__":
    run_script(main)
