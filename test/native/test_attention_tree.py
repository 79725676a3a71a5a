"""Tree attention against fp64: random trees, chains and stars, at awkward lengths, windows, batches and splits."""

from __future__ import annotations

import random
from typing import Any

import pytest
from kernel_case import K, assert_untouched, needs_gpu, poisoned, random_bf16, stream, torch
from rounding_ties import attended_alike
from test_attention_decode import EPS, FORMATS, WRITTEN, plain, rotate, stored

pytestmark = needs_gpu
CAPACITY = 4200  # more than one cluster of blocks works on it

Parents = list[int]


def chain(count: int) -> Parents:
    return list(range(-1, count - 1))


def star(count: int) -> Parents:
    return [-1] + [0] * (count - 1)


def random_tree(count: int, seed: int) -> Parents:
    """Parents before children; now and then a second root."""
    draw = random.Random(seed)
    return [-1] + [draw.randrange(-1 if draw.random() < 0.1 else 0, i) for i in range(1, count)]


def ancestors(parents: Parents) -> list[list[int]]:
    """Each node's path from the root, itself last."""
    paths: list[list[int]] = []
    for i, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), i])
    return paths


def signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def tables(head_dim: int) -> tuple[Any, Any]:
    angles = torch.arange(CAPACITY, dtype=torch.float64)[:, None] * 0.03 ** torch.linspace(0, 1, head_dim // 2)
    return torch.cos(angles).float().cuda(), torch.sin(angles).float().cuda()


def ints(values: Any) -> Any:
    return torch.tensor(list(values), device="cuda", dtype=torch.int32)


class Case:
    """Sequences (prefix length, parents), their qkv and cache; the slot of sequence i is num_sequences - i."""

    def __init__(
        self, head_dim: int, heads: int, kv_heads: int, sequences: list[tuple[int, Parents]], window: int = 0,
        normed: bool = False, form: str = "fp16",
    ) -> None:  # fmt: skip
        self.head_dim, self.heads, self.kv_heads, self.window = head_dim, heads, kv_heads, window
        self.sequences, self.form = sequences, form
        self.paths = [ancestors(parents) for _, parents in sequences]
        numbers = torch.randn((len(sequences) + 1, 2, kv_heads, CAPACITY, head_dim), device="cuda")
        for i, (prefix, _) in enumerate(sequences):
            if prefix >= 0:
                numbers[len(sequences) - i, :, :, prefix:] = float("nan")  # what nobody wrote must not be read
        self.kv = stored(form, numbers)
        self.starts = [0]
        for _, parents in sequences:
            self.starts.append(self.starts[-1] + len(parents))
        self.tokens = self.starts[-1]
        self.qkv = torch.randn((self.tokens, heads + 2 * kv_heads, head_dim), device="cuda") * 2
        self.gains = [random_bf16(head_dim) + 1 for _ in range(2)] if normed else [None, None]
        self.tables = tables(head_dim)
        self.out = poisoned(self.tokens, heads * head_dim, dtype=torch.bfloat16)

    def attended_alike(self, got: Any, q: Any, position: int, seen: Any) -> bool:
        """Whether `got` is the attention of queries q (heads, head_dim) over the keys and values `seen`.

        Tensor cores take queries rounded to fp16 beside that cache, else to bf16, which scores make visible."""
        rounded_to = torch.float16 if self.form == "fp16" else torch.bfloat16
        turned = rotate(q, position, *self.tables, self.gains[0])
        got = got.view(-1, self.head_dim)
        return attended_alike(got, turned, rounded_to, lambda x: attend(x, seen, self.head_dim), rtol=2**-6, atol=8e-3)

    def run(self, splits: int = 0, repeats: int = 1, masks: list[int] | None = None, most_rows: int = 0) -> Any:
        longest = max(len(parents) for _, parents in self.sequences)
        count = len(self.sequences)
        workspace = torch.zeros(
            K.tree_attention_workspace_bytes(count * longest, self.heads, self.head_dim), dtype=torch.uint8,
            device="cuda",
        )  # fmt: skip
        words = masks or [sum(1 << j for j in path) for paths in self.paths for path in paths]
        depths = [len(path) - 1 for paths in self.paths for path in paths]
        for _ in range(repeats):
            K.tree_attention(
                self.qkv.view(self.tokens, -1), self.kv, ints(self.starts), ints(range(count, 0, -1)),
                ints(prefix for prefix, _ in self.sequences), ints(depths),
                torch.tensor([signed(w) for w in words], device="cuda", dtype=torch.int64), *self.tables, self.out,
                longest, self.heads, self.head_dim**-0.5, *self.gains, EPS, self.window, splits, most_rows,
                workspace, stream=stream(),
            )  # fmt: skip
        return self.out

    def check(self, splits: int = 0, most_rows: int = 0) -> None:
        before = self.kv.clone()
        out = self.run(splits, repeats=2, most_rows=most_rows)  # the second call finds the workspace as the first left it
        relative, absolute = WRITTEN[self.form]
        tolerance = dict(rtol=relative, atol=max(absolute, 1e-5))
        cache, q_heads, kv_heads = plain(self.kv), self.heads, self.kv_heads
        for s, (prefix, parents) in enumerate(self.sequences):
            rows = out[self.starts[s] : self.starts[s + 1]]
            slot = len(self.sequences) - s
            if prefix < 0:
                assert bool(torch.isnan(rows).all())
                continue
            for i in range(len(parents)):
                q, key, value = self.qkv[self.starts[s] + i].double().split([q_heads, kv_heads, kv_heads])
                path, at = self.paths[s][i], prefix + i
                position = prefix + len(path) - 1
                assert torch.allclose(
                    cache[slot, 0, :, at], rotate(key, position, *self.tables, self.gains[1]), **tolerance
                )
                assert torch.allclose(cache[slot, 1, :, at], value, **tolerance)
                before[slot, :, :, at] = self.kv[slot, :, :, at]
                seen = [*range(prefix), *(prefix + j for j in path)]
                seen = seen[-self.window :] if self.window else seen
                assert self.attended_alike(rows[i], q, position, cache[slot][:, :, seen]), (s, i, path)
        same = (self.kv == before) | (torch.isnan(self.kv.float()) & torch.isnan(before.float()))
        assert bool(same.all())  # nothing else was written
        assert_untouched(out)


def attend(q: Any, seen: Any, head_dim: int) -> Any:
    """(heads, head_dim) of one token's rotated queries over (2, kv_heads, positions, head_dim)."""
    keys, values = seen.repeat_interleave(q.shape[0] // seen.shape[1], 1)
    weights = torch.softmax(torch.einsum("hd,hpd->hp", q, keys) * head_dim**-0.5, dim=1)
    return torch.einsum("hp,hpd->hd", weights, values)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("form", ["bf16", "fp16"])
def test_every_head_dim_and_group_with_random_trees(head_dim: int, group: int, form: str) -> None:
    for seed, (prefix, count) in enumerate([(0, 1), (1, 2), (19, 5), (63, 3), (64, 16), (98, 33), (250, 64), (988, 7)]):
        Case(head_dim, 2 * group, 2, [(prefix, random_tree(count, seed))], form=form).check()


@pytest.mark.parametrize("shape", [chain, star])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 17, 63, 64])
def test_chains_and_stars(shape: Any, count: int) -> None:
    for prefix in (0, 37, 320):
        Case(64, 8, 2, [(prefix, shape(count))]).check()
        Case(256, 4, 1, [(prefix, shape(count))]).check()


@pytest.mark.parametrize("splits", [0, 1, 2, 5, 16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("form", FORMATS)
def test_a_long_prefix_is_split_over_clusters(head_dim: int, form: str, splits: int) -> None:
    Case(head_dim, 8, 2, [(4100, random_tree(13, 1))], form=form).check(splits)
    Case(head_dim, 8, 2, [(3001, random_tree(64, 2))], form=form).check(splits)
    Case(head_dim, 4, 4, [(4199, chain(1))], form=form).check(splits)


@pytest.mark.parametrize("splits", [0, 3])
def test_sequences_of_different_lengths_and_free_places_share_a_call(splits: int) -> None:
    sequences = [(500, random_tree(9, 1)), (-1, chain(4)), (0, star(3)), (4000, random_tree(40, 2)), (63, chain(1))]
    Case(64, 9, 3, sequences).check(splits)
    Case(128, 8, 2, sequences[::-1]).check(splits)
    Case(256, 4, 1, sequences).check(splits)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_as_many_sequences_as_a_call_takes_do_not_share_counters(head_dim: int) -> None:
    counts = [1 + i % 3 for i in range(63)] + [64]
    Case(head_dim, 4, 1, [(2100 + i, random_tree(n, i)) for i, n in enumerate(counts)]).check(2)


@pytest.mark.parametrize("window", [1, 5, 19, 64, 300])
def test_a_window_hides_what_lies_before_it_along_the_path(window: int) -> None:
    Case(64, 8, 2, [(0, chain(30)), (500, random_tree(33, 3)), (130, chain(64))], window).check()
    Case(96, 4, 2, [(4000, random_tree(16, 4))], window).check(2)
    Case(256, 4, 1, [(0, chain(30)), (500, random_tree(33, 3)), (4000, random_tree(16, 4))], window).check(2)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_norms_come_before_the_rotation(head_dim: int) -> None:
    Case(head_dim, 16, 8, [(99, random_tree(11, 5)), (700, chain(6))], normed=True).check()


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("count", [4, 31])
def test_an_fp8_cache_is_read_as_it_was_written(head_dim: int, count: int) -> None:
    Case(head_dim, 8, 2, [(0, random_tree(count, 6)), (777, random_tree(count, 7))], form="fp8").check()


@pytest.mark.parametrize("form", ["bf16", "fp16", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_blocks_of_half_as_many_rows_give_the_same_where_shared_memory_is_small(head_dim: int, form: str) -> None:
    """As compute capability 8.6, 8.9 and 12.0 have it with heads of 128 and FP8."""
    sequences = [(2100 + i, random_tree(n, i)) for i, n in enumerate([64, 1, 33, *[2] * 28, 64])]
    for splits in (0, 2):
        Case(head_dim, 8, 2, sequences, form=form).check(splits, most_rows=32)
    with pytest.raises(ValueError, match="33 sequences are more than .* blocks of 32 rows have counters for: at most 32"):
        Case(head_dim, 8, 2, [*sequences, (9, chain(1))], form=form).run(most_rows=32)


@pytest.mark.parametrize("form", ["bf16", "fp8"])  # beside fp16 the two round queries differently
@pytest.mark.parametrize("head_dim", [128, 256])
def test_a_chain_is_the_causal_attention_of_prefill(head_dim: int, form: str) -> None:
    """Against the other kernel: the same keys in the cache, and outputs that differ by rounding alone."""
    case = Case(head_dim, 8, 2, [(300, chain(21))], form=form)
    other = case.kv.clone()
    out = case.run()
    q, prefilled = (poisoned(21, 8 * head_dim, dtype=torch.bfloat16) for _ in range(2))
    K.rope_kv_write(
        case.qkv.view(21, -1), other, ints([1] * 21), ints(range(300, 321)), *case.tables, q, 8, stream=stream()
    )
    K.prefill_attention(q, other, ints([0, 21]), ints([1]), ints([300]), prefilled, 21, head_dim**-0.5, stream=stream())
    assert torch.equal(plain(case.kv)[1, :, :, :321].nan_to_num(), plain(other)[1, :, :, :321].nan_to_num())
    assert torch.allclose(out.double(), prefilled.double(), rtol=2**-6, atol=4e-3)


def test_a_bit_of_the_mask_is_one_key_and_no_other() -> None:
    """Without the bit of the token itself, its own key counts for nothing."""
    case = Case(64, 4, 2, [(70, star(3))])
    case.run(masks=[0b001, 0b001, 0b101])
    cache = plain(case.kv)[1]
    q = case.qkv[1].double()[:4]
    assert case.attended_alike(case.out[1], q, 71, cache[:, :, :71])


def test_tokens_of_a_call_that_fills_the_slot_fit_and_more_are_left_alone() -> None:
    Case(64, 4, 2, [(CAPACITY - 16, chain(16))]).check(2)
    case = Case(64, 4, 2, [(CAPACITY - 15, chain(16))])
    before = case.kv.clone()
    assert bool(torch.isnan(case.run()).all())
    assert torch.equal(case.kv.nan_to_num(), before.nan_to_num())
