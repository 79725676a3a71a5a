"""The device keeps of a draft what decoding token by token would choose, and what it emits follows the target."""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from kernel_case import K, needs_gpu, stream, torch

from edgellm_ros.core import SamplingParams
from edgellm_ros.runtime.sampling import Sampler
from edgellm_ros.vocab_map import VocabMap

pytestmark = needs_gpu
Floats = npt.NDArray[np.float32]

GREEDY = SamplingParams(temperature=0.0)
PLAIN = SamplingParams(temperature=0.9, top_k=0, top_p=1.0, min_p=0.0)
FILTERED = SamplingParams(temperature=0.7, top_k=12, top_p=0.9, min_p=0.02)


def row_bytes(params: SamplingParams, draw_index: int) -> bytes:
    """The C struct SamplingRow, of what counts here."""
    data = struct.pack(
        "<Q6f6i", params.seed or 0, params.temperature, params.top_p, params.min_p, 1.0, 0.0, 0.0, params.top_k,
        draw_index, 0, 0, -1, 0,
    )  # fmt: skip
    assert len(data) == K.SAMPLING_ROW_BYTES
    return data


def seeded(params: SamplingParams, seed: int) -> SamplingParams:
    return dataclasses.replace(params, seed=seed)


class Draft:
    """Sequences of up to `logits.shape[1]` nodes, and one call of the kernel."""

    def __init__(
        self, logits: Floats, token_ids: Any, num_nodes: list[int], params: list[SamplingParams], parents: Any = None,
        probs: Floats | None = None, draw_index: int = 0, vocab_map: VocabMap | None = None,
    ) -> None:  # fmt: skip
        self.row_tokens = None if vocab_map is None else to_ints(vocab_map.token_ids)
        self.logits = torch.from_numpy(logits).cuda()
        sequences, nodes, _ = logits.shape
        self.token_ids, self.num_nodes = to_ints(token_ids), to_ints(num_nodes)
        self.parents = None if parents is None else to_ints(parents)
        self.probs = None if probs is None else torch.from_numpy(probs).cuda()
        data = b"".join(row_bytes(p, draw_index) for p in params)
        self.rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(sequences, -1).cuda()
        self.scores = torch.empty_like(self.logits)
        self.paths = torch.full((sequences, nodes), -9, dtype=torch.int32, device="cuda")
        self.lengths, self.next_tokens = (
            torch.full((sequences,), -9, dtype=torch.int32, device="cuda") for _ in range(2)
        )
        self.workspace = torch.zeros(
            K.draft_acceptance_workspace_bytes(sequences, nodes), dtype=torch.uint8, device="cuda"
        )

    def accept(self) -> list[tuple[list[int], int]]:
        """Each sequence's path and next token."""
        K.accept_draft(
            self.logits, self.token_ids, self.num_nodes, self.rows, self.scores, self.paths, self.lengths,
            self.next_tokens, self.workspace, self.parents, self.probs, self.row_tokens,
            stream=stream(),
        )  # fmt: skip
        lengths, paths = self.lengths.tolist(), self.paths.tolist()
        for length, path in zip(lengths, paths, strict=True):
            assert length < 0 or (min(path[:length]) >= 0 and set(path[length:]) <= {-1})
        return [(p[:n], t) for p, n, t in zip(paths, lengths, self.next_tokens.tolist(), strict=True)]

    def draw_indices(self) -> list[int]:
        return [struct.unpack_from("<i", bytes(row), 8 + 6 * 4 + 4)[0] for row in self.rows.cpu().numpy()]


def to_ints(values: Any) -> Any:
    return torch.tensor(np.asarray(values), dtype=torch.int32, device="cuda").contiguous()


def random_logits(rng: np.random.Generator, *shape: int, spread: float = 2.0) -> Floats:
    return (rng.standard_normal(shape) * spread).astype(np.float32)


def random_tree(rng: np.random.Generator, count: int) -> list[int]:
    return [-1, *(int(rng.integers(max(0, i - 4), i)) for i in range(1, count))]


def walked(sampler: Sampler, logits: Floats, token_ids: list[int], parents: list[int]) -> tuple[list[int], int]:
    """Decoding token by token with `sampler`, for as long as the draft has the token."""
    path = [0]
    while True:
        token = sampler.draw(logits[path[-1]])
        children = [i for i, p in enumerate(parents) if p == path[-1] and i > 0 and token_ids[i] == token]
        if not children:
            return path, token
        path.append(children[0])


def likely_tokens(rng: np.random.Generator, logits: Floats, parents: list[int]) -> list[int]:
    """Draft tokens among the parent's four most likely, so that some are accepted."""
    tokens = [0]
    for parent in parents[1:]:
        tokens.append(int(rng.choice(np.argsort(-logits[parent])[:4])))
    return tokens


@pytest.mark.parametrize("params", [GREEDY, PLAIN, FILTERED], ids=["greedy", "plain", "filtered"])
@pytest.mark.parametrize("vocab", [5, 99, 989, 32003])
@pytest.mark.parametrize("nodes", [1, 2, 7, 33, 64])
def test_a_tree_keeps_what_decoding_token_by_token_chooses(params: SamplingParams, vocab: int, nodes: int) -> None:
    """The sampler of the CPU path, seed by seed: the same tokens with and without speculation."""
    rng = np.random.default_rng(vocab + nodes)
    counts = [nodes, max(1, nodes // 2), 0, nodes]
    logits = random_logits(rng, 4, nodes, vocab, spread=3.0)
    parents = [random_tree(rng, nodes) for _ in counts]
    tokens = [likely_tokens(rng, logits[s], parents[s]) for s in range(4)]
    rows = [seeded(params, 10 + s) for s in range(4)]
    draft = Draft(logits, tokens, counts, rows, parents)
    got = draft.accept()
    for s, count in enumerate(counts):
        if count == 0:
            assert got[s][1] == -9  # left alone
            assert draft.draw_indices()[s] == 0
            continue
        expected = walked(Sampler(rows[s], vocab), logits[s], tokens[s][:count], parents[s][:count])
        assert got[s] == expected, s
        assert draft.draw_indices()[s] == len(expected[0])


@pytest.mark.parametrize("params", [GREEDY, PLAIN, FILTERED], ids=["greedy", "plain", "filtered"])
def test_with_a_cut_head_a_draft_has_the_models_own_tokens(params: SamplingParams) -> None:
    rng = np.random.default_rng(8)
    rows, vocab, nodes = 989, 4001, 12
    found = VocabMap(np.sort(rng.choice(vocab, rows, replace=False)), vocab)
    dropped = int(np.setdiff1d(np.arange(vocab), found.token_ids)[0])
    logits = random_logits(rng, 6, nodes, rows)
    parents = [random_tree(rng, nodes) for _ in range(6)]
    chosen = [seeded(params, s) for s in range(6)]
    tokens = [found.token_ids[likely_tokens(rng, logits[b], parents[b])].tolist() for b in range(6)]
    for b in range(6):
        tokens[b][-1] = dropped
    got = Draft(logits, tokens, [nodes] * 6, chosen, parents, vocab_map=found).accept()
    for b in range(6):
        sampler = Sampler(chosen[b], vocab, [], found)
        assert got[b] == walked(sampler, logits[b], tokens[b], parents[b]), b
    # With the draft's probabilities, by column of the head, as in the terms of its rows.
    chain = rng.integers(0, rows, (6, nodes))
    probs = np.full_like(logits, 1 / rows)
    by_row = Draft(logits, chain, [nodes] * 6, chosen, probs=probs).accept()
    by_token = Draft(logits, found.token_ids[chain], [nodes] * 6, chosen, probs=probs, vocab_map=found).accept()
    assert by_token == [(path, int(found.token_ids[row])) for path, row in by_row]


def test_chains_need_no_parents_and_go_on_with_the_next_draws() -> None:
    rng = np.random.default_rng(3)
    logits = random_logits(rng, 2, 9, 500)
    chain = list(range(-1, 8))
    tokens = [likely_tokens(rng, logits[s], chain) for s in range(2)]
    rows = [seeded(PLAIN, 1), seeded(PLAIN, 2)]
    got = Draft(logits, tokens, [9, 9], rows, draw_index=5).accept()
    for s in range(2):
        sampler = Sampler(rows[s], 500)
        for _ in range(5):
            sampler.draw(logits[s, 0])
        assert got[s] == walked(sampler, logits[s], tokens[s], chain)


@pytest.mark.parametrize("with_probs", [False, True])
def test_all_accepted_and_all_rejected(with_probs: bool) -> None:
    rng = np.random.default_rng(4)
    logits = random_logits(rng, 2, 6, 300)
    best = logits.argmax(-1)
    tokens = np.zeros((2, 6), np.int32)
    tokens[0, 1:] = best[0, :-1]
    tokens[1, 1:] = logits[1, :-1].argmin(-1)
    probs = np.full((2, 6, 300), 1 / 300, np.float32) if with_probs else None
    for params in (GREEDY, SamplingParams(temperature=0.01, seed=3)):
        accepted, rejected = Draft(logits, tokens, [6, 6], [params, params], probs=probs).accept()
        assert accepted == ([0, 1, 2, 3, 4, 5], int(best[0, 5]))
        assert rejected == ([0], int(best[1, 0]))


def test_of_equal_logits_and_equal_children_the_first_wins() -> None:
    logits = np.zeros((1, 4, 50), np.float32)
    logits[0, :, [20, 30]] = 4.0
    (got,) = Draft(logits, [[0, 30, 20, 20]], [4], [GREEDY], [[-1, 0, 0, 0]]).accept()
    assert got == ([0, 2], 20)


def test_logits_that_are_not_finite_end_the_path_with_no_token() -> None:
    logits = random_logits(np.random.default_rng(5), 1, 3, 77)
    best = int(logits[0, 0].argmax())
    logits[0, 1, 7] = np.nan
    for params in (GREEDY, SamplingParams(temperature=0.01, seed=1)):
        assert Draft(logits, [[0, best, 5]], [3], [params]).accept() == [([0, 1], -1)]


def test_the_workspace_is_left_ready_for_the_next_call_and_the_same_seed_gives_the_same_path() -> None:
    rng = np.random.default_rng(6)
    logits = random_logits(rng, 3, 16, 4001)
    parents = [random_tree(rng, 16) for _ in range(3)]
    tokens = [likely_tokens(rng, logits[s], parents[s]) for s in range(3)]
    draft = Draft(logits, tokens, [16, 9, 1], [seeded(FILTERED, s) for s in range(3)], parents)
    fresh = draft.rows.clone()
    first = draft.accept()
    draft.rows.copy_(fresh)
    assert draft.accept() == first
    moved = draft.accept()  # later draws
    assert moved != first


# Distributions: each trial is a sequence of its own with its own seed, drafted by NumPy.


def softmax(logits: Floats, temperature: float) -> npt.NDArray[np.float64]:
    weights = np.exp((logits.astype(np.float64) - logits.max(-1, keepdims=True)) / temperature)
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def chi_square(counts: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> float:
    """Standard deviations above what the statistic is under `expected`; rare outcomes count together."""
    total = counts.sum()
    order = np.argsort(-expected)
    large = order[expected[order] * total >= 8]
    rest = np.setdiff1d(order, large)
    observed = np.append(counts[large], counts[rest].sum()).astype(np.float64)
    wanted = np.append(expected[large], expected[rest].sum()) * total
    kept = wanted > 0
    if observed[~kept].any():  # what cannot be drawn was
        return float("inf")
    statistic = float(((observed - wanted)[kept] ** 2 / wanted[kept]).sum())
    degrees = int(kept.sum()) - 1
    assert degrees >= 2  # else there is nothing to compare
    return (statistic - degrees) / math.sqrt(2 * degrees)


def trials(
    params: SamplingParams, logits: Floats, token_ids: npt.NDArray[np.int32], parents: Any, probs: Floats | None
) -> list[tuple[list[int], int]]:
    """`logits` (nodes, vocab) for all; token_ids (trials, nodes)."""
    results = []
    for start in range(0, len(token_ids), 500):
        part = token_ids[start : start + 500]
        count = len(part)
        results += Draft(
            np.broadcast_to(logits, (count, *logits.shape)).copy(), part, [logits.shape[0]] * count,
            [seeded(params, 1000 + start + i) for i in range(count)],
            None if parents is None else [parents] * count,
            None if probs is None else np.broadcast_to(probs, (count, *probs.shape)).copy(),
        ).accept()  # fmt: skip
    return results


def emitted(result: tuple[list[int], int], token_ids: npt.NDArray[np.int32], place: int) -> int | None:
    path, token = result
    tokens = [*(int(token_ids[node]) for node in path[1:]), token]
    return tokens[place] if place < len(tokens) else None


@pytest.mark.parametrize("params", [PLAIN, FILTERED], ids=["plain", "filtered"])
@pytest.mark.parametrize("vocab", [19, 99])
def test_a_chain_with_draft_probabilities_emits_the_targets_distribution(params: SamplingParams, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    count, nodes = 20000, 3
    logits = random_logits(rng, nodes, vocab, spread=1.5)
    probs = softmax(0.6 * logits + random_logits(rng, nodes, vocab), 1.0)
    probs = np.roll(probs, 1, axis=0)  # node i was drawn from what the draft thought after node i - 1
    tokens = np.zeros((count, nodes), np.int32)
    for node in range(1, nodes):
        tokens[:, node] = rng.choice(vocab, count, p=probs[node])
    results = trials(params, logits, tokens, None, probs.astype(np.float32))
    kept = np.array([len(path) for path, _ in results])
    for place in range(nodes):
        target = Sampler(params, vocab).distribution(logits[place])
        drawn = [emitted(r, t, place) for r, t in zip(results, tokens, strict=True)]
        counts = np.bincount([d for d in drawn if d is not None], minlength=vocab)
        assert counts.sum() == (kept > place).sum()
        assert chi_square(counts, target) < 5.0, place
        if place + 1 < nodes:  # the test would see the draft's distribution
            assert chi_square(counts, probs[place + 1]) > 50.0
    accepted = np.minimum(Sampler(params, vocab).distribution(logits[0]), probs[1]).sum()
    assert abs((kept > 1).mean() - accepted) < 5 * math.sqrt(0.25 / count)  # Leviathan et al. 2023, theorem 3.5


@pytest.mark.parametrize("params", [PLAIN, FILTERED], ids=["plain", "filtered"])
def test_a_tree_emits_the_targets_distribution(params: SamplingParams) -> None:
    rng = np.random.default_rng(8)
    vocab, count = 40, 20000
    parents = [-1, 0, 0, 0, 1, 1, 2]
    logits = random_logits(rng, len(parents), vocab, spread=1.5)
    order = np.argsort(-logits, axis=1)
    tokens = np.zeros((count, len(parents)), np.int32)
    for node, (parent, place) in enumerate(zip(parents, [0, 0, 1, 2, 0, 1, 0], strict=True)):
        if node:
            tokens[:, node] = order[parent, place]  # the draft always proposes the same
    results = trials(params, logits, tokens, parents, None)
    counts = np.bincount([emitted(r, t, 0) for r, t in zip(results, tokens, strict=True)], minlength=vocab)
    assert chi_square(counts, Sampler(params, vocab).distribution(logits[0])) < 5.0
    behind_first = [emitted(r, t, 1) for r, t in zip(results, tokens, strict=True) if r[0][1:2] == [1]]
    assert len(behind_first) > 500
    counts = np.bincount(behind_first, minlength=vocab)
    assert chi_square(counts, Sampler(params, vocab).distribution(logits[1])) < 5.0
    assert chi_square(counts, Sampler(params, vocab).distribution(logits[2])) > 20.0


def test_a_replacement_is_never_the_rejected_token_nor_one_the_draft_likes_better() -> None:
    rng = np.random.default_rng(9)
    vocab, count = 30, 4000
    logits = random_logits(rng, 2, vocab)
    target, probs = softmax(logits, PLAIN.temperature), softmax(random_logits(rng, 2, vocab), 1.0)
    tokens = np.zeros((count, 2), np.int32)
    tokens[:, 1] = rng.choice(vocab, count, p=probs[1])
    results = trials(PLAIN, logits, tokens, None, probs.astype(np.float32))
    replaced = [token for path, token in results if len(path) == 1]
    assert len(replaced) > 400
    assert all(target[0, token] > probs[1, token] for token in replaced)


def test_a_draft_that_is_the_target_is_always_accepted() -> None:
    rng = np.random.default_rng(10)
    vocab, count = 64, 2000
    logits = random_logits(rng, 4, vocab)
    probs = np.roll(softmax(logits, PLAIN.temperature), 1, axis=0)
    tokens = np.zeros((count, 4), np.int32)
    for node in range(1, 4):
        tokens[:, node] = rng.choice(vocab, count, p=probs[node])
    results = trials(PLAIN, logits, tokens, None, probs.astype(np.float32))
    assert sum(len(path) == 4 for path, _ in results) >= count - 2  # rounding may part p and q by 1e-7


@pytest.mark.parametrize("vocab", [151936, 262144])
def test_a_large_vocabulary_fits(vocab: int) -> None:
    rng = np.random.default_rng(11)
    logits = random_logits(rng, 1, 5, vocab)
    tokens = [likely_tokens(rng, logits[0], [-1, 0, 1, 2, 3])]
    for params in (GREEDY, seeded(PLAIN, 4), seeded(FILTERED, 5)):
        (got,) = Draft(logits, tokens, [5], [params]).accept()
        assert got == walked(Sampler(params, vocab), logits[0], tokens[0], [-1, 0, 1, 2, 3])
