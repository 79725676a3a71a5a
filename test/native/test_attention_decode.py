"""Decode attention against fp64: every head_dim, group, cache format and length, splits, windows, batches, slots."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_case import K, assert_untouched, needs_gpu, poisoned, random_bf16, stream, torch

pytestmark = needs_gpu
CAPACITY = 1031
LONG = 20_011
EPS = 1e-6
FORMATS = ("bf16", "fp16", "fp8")
# What is written: relative and absolute error of one rounding.
WRITTEN = {"bf16": (2**-8, 1e-6), "fp16": (2**-10, 1e-6), "fp8": (2**-4, 2**-9)}


def tables(head_dim: int, capacity: int = CAPACITY) -> tuple[Any, Any]:
    angles = torch.arange(capacity, dtype=torch.float64)[:, None] * 0.03 ** torch.linspace(0, 1, head_dim // 2)
    return torch.cos(angles).float().cuda(), torch.sin(angles).float().cuda()


def stored(form: str, numbers: Any) -> Any:
    """Numbers in fp32 as a cache has them and the bindings take them."""
    if form != "fp8":
        return numbers.to(torch.bfloat16 if form == "bf16" else torch.float16)
    return numbers.to(torch.float8_e4m3fn).view(torch.uint8)


def make_cache(form: str, *shape: int) -> Any:
    """A cache of random numbers."""
    return stored(form, torch.randn(shape, device="cuda"))


def plain(cache: Any) -> Any:
    """What a cache of any format stands for, in fp64."""
    return (cache.view(torch.float8_e4m3fn).float() if cache.dtype == torch.uint8 else cache).double()


def rotate(x: Any, position: int, cos: Any, sin: Any, gain: Any) -> Any:
    """(heads, head_dim) fp64: the optional head norm, then half-split RoPE."""
    if gain is not None:
        x = x * torch.rsqrt((x * x).mean(1, keepdim=True) + EPS) * gain.double()
    c, s = cos[position].double(), sin[position].double()
    low, high = x.chunk(2, dim=1)
    return torch.cat([low * c - high * s, high * c + low * s], dim=1)


def reference(q: Any, keys: Any, values: Any, length: int, window: int, scale: float) -> Any:
    """(heads, head_dim) attention of one token over (kv_heads, capacity, head_dim)."""
    first = max(0, length - window) if window else 0
    group = q.shape[0] // keys.shape[0]
    keys = plain(keys[:, first:length]).repeat_interleave(group, 0)
    values = plain(values[:, first:length]).repeat_interleave(group, 0)
    weights = torch.softmax(torch.einsum("hd,hpd->hp", q, keys) * scale, dim=1)
    return torch.einsum("hp,hpd->hd", weights, values)


def make_workspace(batch: int, heads: int, head_dim: int) -> Any:
    size = K.decode_attention_workspace_bytes(batch, heads, head_dim)
    return torch.zeros(size, dtype=torch.uint8, device="cuda")


def check(
    head_dim: int, heads: int, kv_heads: int, positions: list[int], splits: int = 8, window: int = 0,
    normed: bool = False, form: str = "bf16", capacity: int = CAPACITY, cluster: int = 0, loud: float = 2.0,
    most_attended: int = 0,
) -> None:  # fmt: skip
    """`splits` is most_splits; `loud` the deviation of qkv: small, and all weights are alike; most_attended 0: as without
    a window."""
    batch, num_slots = len(positions), len(positions) + 2
    cos, sin = tables(head_dim, capacity)
    kv = make_cache(form, num_slots, 2, kv_heads, capacity, head_dim)
    slots = torch.randperm(num_slots)[:batch]
    for slot, position in zip(slots.tolist(), positions, strict=True):
        if 0 < window <= position:  # what it hides shows, even with a weight of zero
            kv[slot, :, :, : position + 1 - window] = 0x7F if form == "fp8" else float("nan")
    before = kv.clone()
    qkv = torch.randn((batch, heads + 2 * kv_heads, head_dim), device="cuda") * loud
    gains = [random_bf16(head_dim) + 1 for _ in range(2)] if normed else [None, None]
    out = poisoned(batch, heads * head_dim, dtype=torch.bfloat16)
    workspace = make_workspace(batch, heads, head_dim)
    scale = head_dim**-0.5
    for _ in range(2):  # the second call finds the workspace as the first left it, and overwrites what it wrote
        K.decode_attention(
            qkv.view(batch, -1), kv, slots.int().cuda(), torch.tensor(positions, device="cuda", dtype=torch.int32),
            cos, sin, out, heads, scale, *gains, EPS, window, splits, most_attended or max(*positions, 0) + 1, cluster,
            workspace=workspace, stream=stream(),
        )  # fmt: skip
    for b, position in enumerate(positions):
        slot = int(slots[b])
        if position < 0:
            assert bool((out[b] == 0).all())
            continue
        q, key, value = qkv[b].double().split([heads, kv_heads, kv_heads])
        written = plain(kv[slot, :, :, position])
        rtol, least = WRITTEN[form]
        assert torch.allclose(written[0], rotate(key, position, cos, sin, gains[1]), rtol=rtol, atol=least)
        assert torch.allclose(written[1], value, rtol=rtol, atol=least)
        before[slot, :, :, position] = kv[slot, :, :, position]
        attended = reference(rotate(q, position, cos, sin, gains[0]), *kv[slot], position + 1, window, scale)
        # The output's own rounding, and that of the weights (bf16, or fp16 where the cache is not): of 14,400 random
        # heads simulated in fp64, the latter moved an output by 3.8e-3 at most. Where all weights are alike, errors add
        # up as independent ones do: of 1,200 heads of n = 1,025 to 9,001 positions, to 0.0071 / sqrt(n) at most.
        atol = 8e-3 if loud > 1 else 0.02 / min(position + 1, window or position + 1) ** 0.5
        assert torch.allclose(out[b].view(heads, head_dim).double(), attended, rtol=2**-7, atol=atol)
    assert torch.equal(kv.view(torch.uint8), before.view(torch.uint8))  # nothing else was written
    assert_untouched(out)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12])
@pytest.mark.parametrize("splits", [8, 1, 4, 64])
def test_every_head_dim_and_group_at_awkward_lengths(head_dim: int, group: int, splits: int) -> None:
    for position in (0, 1, 6, 18, 62, 63, 64, 98, 988, 999):
        check(head_dim, 2 * group, 2, [position], splits)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("form", ["fp16", "fp8"])
def test_every_cache_format_is_read_as_it_was_written(head_dim: int, group: int, form: str) -> None:
    for position in (0, 6, 62, 63, 64, 700, 999):
        check(head_dim, 2 * group, 2, [position], 8, form=form)
    check(head_dim, 2 * group, 2, [999, -1, 15, 16], 16, form=form)


@pytest.mark.parametrize("cluster", [0, 1, 8])
@pytest.mark.parametrize("splits", [8, 16, 64])
@pytest.mark.parametrize("form", FORMATS)
def test_long_contexts(form: str, splits: int, cluster: int) -> None:
    for head_dim, heads, kv_heads in ((128, 8, 2), (64, 9, 3), (256, 4, 1)):
        # In one launch with a long context: one that is just not, and ones with fewer splits.
        positions = [4999, 19_999, K.LONG_CONTEXT - 1, 77, -1, 1200, K.LONG_CONTEXT]
        check(head_dim, heads, kv_heads, positions, splits, form=form, capacity=LONG, cluster=cluster)
        # Many weights of about the same size: what is wrong with each adds up, and the output is small.
        check(head_dim, heads, kv_heads, [19_999], splits, form=form, capacity=LONG, cluster=cluster, loud=0.3)


@pytest.mark.parametrize("splits", [8, 2, 16])
def test_sequences_of_different_lengths_and_free_places_share_a_batch(splits: int) -> None:
    check(64, 9, 3, [988, 0, -1, 130, 18, 511, 512, 1030], splits)
    check(128, 32, 8, [1030, -1, 7, 255, 256, 257, 98, 3], splits)
    check(80, 4, 2, [-1, -1, 300], splits)
    check(256, 4, 1, [700, 0, -1, 15, 16, 64, 511, 1030], splits)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("splits", [8, 2])
@pytest.mark.parametrize("window", [1, 15, 16, 19, 256, 4096])
def test_a_window_hides_what_lies_before_it(window: int, splits: int, form: str) -> None:
    check(128, 8, 2, [0, 18, 255, 256, 988], splits, window, form=form)
    check(256, 8, 2, [0, 18, 255, 256, 988], splits, window, form=form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("splits", [8, 16, 64])
@pytest.mark.parametrize("window", [1025, 4096, 9001])
def test_a_long_window_hides_what_lies_before_it(window: int, splits: int, form: str) -> None:
    """Of several eights of splits and, beyond LONG_CONTEXT, of eight warps; also launched for the window alone, as the
    decoder does it. One position too few changes an output by a value divided by the window."""
    for head_dim, heads, kv_heads in ((128, 8, 2), (64, 9, 3), (256, 4, 1)):
        for most_attended in (0, window):
            check(
                head_dim, heads, kv_heads, [2999, 9000, 19_999], splits, window, form=form, capacity=LONG, loud=0.3,
                most_attended=most_attended,
            )  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("splits", [8, 2])
def test_head_norms_come_before_the_rotation(head_dim: int, splits: int) -> None:
    check(head_dim, 16, 8, [0, 99, 700], splits, normed=True)


def test_what_is_not_in_the_slot_yet_is_never_read() -> None:
    """NaN behind the new token, and in its own row, which the call writes."""
    for form, head_dim in (("bf16", 128), ("fp16", 64), ("fp8", 80), ("bf16", 256), ("fp8", 256)):
        for position in (0, 15, 16, 77, 300):
            kv = make_cache(form, 1, 2, 2, CAPACITY, head_dim)
            kv[:, :, :, position:] = 0x7F if form == "fp8" else float("nan")
            cos, sin = tables(head_dim)
            out = torch.empty((1, 4 * head_dim), device="cuda", dtype=torch.bfloat16)
            K.decode_attention(
                torch.randn((1, 8 * head_dim), device="cuda"), kv, torch.zeros(1, device="cuda", dtype=torch.int32),
                torch.tensor([position], device="cuda", dtype=torch.int32), cos, sin, out, 4, 0.1,
                workspace=make_workspace(1, 4, head_dim), stream=stream(),
            )  # fmt: skip
            assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("most", "cluster"), [(8, 0), (16, 0), (16, 1), (64, 0), (64, 8)])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_a_sequence_gets_the_same_bits_alone_in_a_batch_and_in_a_larger_slot(
    head_dim: int, form: str, most: int, cluster: int
) -> None:
    lengths = [500, 3, 77, 9500, 1700, 2999, 1023, K.LONG_CONTEXT - 1]
    kv = make_cache(form, 8, 2, 2, 9501, head_dim)
    larger = torch.zeros_like(make_cache(form, 8, 2, 2, 12_000, head_dim))
    larger[:, :, :, :9501] = kv
    cos, sin = tables(head_dim, 12_000)
    qkv = torch.randn((8, 12 * head_dim), device="cuda")
    slots, positions = (torch.tensor(v, device="cuda", dtype=torch.int32) for v in ([2, 0, 3, 1, 7, 5, 6, 4], lengths))
    workspace = make_workspace(8, 8, head_dim)

    def run(rows: slice, cache: Any, most_attended: int, cluster: int = cluster, exchanges: bool = True) -> Any:
        out = torch.empty((len(slots[rows]), 8 * head_dim), dtype=torch.bfloat16, device="cuda")
        K.decode_attention(
            qkv[rows], cache, slots[rows], positions[rows], cos, sin, out, 8, 0.125, most_splits=most,
            most_attended=most_attended, cluster=cluster, exchanges=exchanges, workspace=workspace, stream=stream(),
        )  # fmt: skip
        return out

    together = run(slice(0, 8), kv, 9501)
    assert torch.equal(run(slice(0, 8), larger, 12_000), together)
    assert torch.equal(run(slice(0, 8), kv, 9501, cluster=1), together)  # merged by whoever is last
    for b in range(8):
        for most_attended in {lengths[b] + 1, max(1024, lengths[b] + 1), max(K.LONG_CONTEXT, lengths[b] + 1), 100_000}:
            for exchanges in (True, False):
                alone = run(slice(b, b + 1), kv, most_attended, exchanges=exchanges)
                assert torch.equal(alone[0], together[b]), (lengths[b], most_attended, exchanges)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("most", [8, 16, 64, 4])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 3), (80, 8), (128, 4), (128, 8), (256, 4)])
def test_a_block_with_several_splits_computes_the_same_bits(head_dim: int, group: int, most: int, form: str) -> None:
    """However many it has: with and without clusters, a window, and sums that two eights exchange."""
    capacity = 9501
    kv, (cos, sin) = make_cache(form, 8, 2, 2, capacity, head_dim), tables(head_dim, capacity)
    qkv = torch.randn((8, (2 * group + 4) * head_dim), device="cuda")
    workspace = make_workspace(8, 2 * group, head_dim)

    def run(
        lengths: list[int], each: int, window: int, cluster: int, exchanges: bool = True, most_attended: int = 0
    ) -> tuple[Any, Any]:
        places = [torch.tensor(v, device="cuda", dtype=torch.int32) for v in ([2, 0, 3, 1, 7, 5, 6, 4], lengths)]
        out = torch.empty((8, 2 * group * head_dim), dtype=torch.bfloat16, device="cuda")
        cache = kv.clone()
        K.decode_attention(
            qkv, cache, *places, cos, sin, out, 2 * group, 0.125, window=window, most_splits=most,
            most_attended=most_attended or max(lengths) + 1, cluster=cluster, splits_per_block=each,
            exchanges=exchanges, workspace=workspace, stream=stream(),
        )  # fmt: skip
        return out, cache

    small_blocks = torch.cuda.get_device_properties(0).shared_memory_per_block_optin < 163 << 10
    for lengths in (
        [500, 3, 77, -1, 1000, 0, 64, 63],
        [2000, 3, 77, 1700, 4000, -1, 1023, 1024],  # of more than one eight, by four warps
        [500, 3, 77, 9500, 1700, -1, 1023, K.LONG_CONTEXT - 1],
    ):
        for window in (0, 700, 1500, 8500):
            expected, written = run(lengths, 1, window, 0)
            if 0 < window < max(lengths):  # as the decoder launches it
                assert torch.equal(run(lengths, 0, window, 0, most_attended=window)[0], expected)
            for each in (0, 2, 4, 8):
                for cluster in (0, 1):
                    splits = K.decode_attention_splits(max(lengths) + 1, most)
                    if each > splits:
                        with pytest.raises(ValueError, match=f"splits_per_block {each} is more than {splits} splits"):
                            run(lengths, each, window, cluster)
                        continue
                    try:
                        out, cache = run(lengths, each, window, cluster)
                    except ValueError as error:  # shared memory: eight heads of a long sequence's blocks, or wide ones
                        assert "room" in str(error) and (small_blocks or (each == 8 and (group == 8 or head_dim == 256)))
                        continue
                    assert torch.equal(out, expected), (lengths, each, window, cluster)
                    assert torch.equal(cache.view(torch.uint8), written.view(torch.uint8))
                    assert torch.equal(run(lengths, each, window, cluster, exchanges=False)[0], expected)


@pytest.mark.parametrize("each", [1, 2, 4])
@pytest.mark.parametrize("cluster", [0, 1])
@pytest.mark.parametrize("position", [0, 300, 2000])
def test_scores_far_below_zero_are_as_good_as_others(position: int, cluster: int, each: int) -> None:
    """Every key points away from its query, and the best of all scores is about -300."""
    cos, sin = torch.ones((CAPACITY * 2, 64), device="cuda"), torch.zeros((CAPACITY * 2, 64), device="cuda")
    kv = make_cache("bf16", 1, 2, 1, CAPACITY * 2, 128)
    kv[:, 0] = kv[:, 0].abs() * 0.05 + 1
    qkv = torch.randn((1, 6, 128), device="cuda")
    qkv[:, :4], qkv[:, 4] = -2.5, 1.0
    out = torch.empty((1, 4 * 128), device="cuda", dtype=torch.bfloat16)
    places = [torch.tensor([v], device="cuda", dtype=torch.int32) for v in (0, position)]
    K.decode_attention(
        qkv.view(1, -1), kv, *places, cos, sin, out, 4, 1.0, most_splits=16, most_attended=position + 1,
        cluster=cluster, splits_per_block=each, workspace=make_workspace(1, 4, 128), stream=stream(),
    )  # fmt: skip
    wanted = reference(qkv[0, :4].double(), *kv[0], position + 1, 0, 1.0)
    assert torch.allclose(out.view(4, 128).double(), wanted, rtol=2**-7, atol=8e-3)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_positions_that_the_predecessor_advances_under_way_are_not_the_ones_prefetched_for(head_dim: int) -> None:
    """With pdl the kernel starts while `greedy` still runs, and may prefetch for the position before."""
    start, ints = 5, dict(device="cuda", dtype=torch.int32)
    cos, sin = tables(head_dim)
    kv = make_cache("bf16", 2, 2, 2, CAPACITY, head_dim)
    qkv = torch.randn((2, 12 * head_dim), device="cuda")
    slots, positions = torch.tensor([1, 0], **ints), torch.tensor([start, 1000], **ints)
    keys = torch.ones((2, 4000), device="cuda", dtype=torch.int64)
    state = (torch.zeros(2, **ints), positions, torch.zeros((2, 4), **ints), torch.zeros(2, **ints))
    workspace = make_workspace(2, 8, head_dim)
    for step in range(1, 25):
        early, late = (torch.empty((2, 8 * head_dim), device="cuda", dtype=torch.bfloat16) for _ in range(2))
        K.greedy(keys, state, stream=stream())
        for to, pdl in ((early, True), (late, False)):
            K.decode_attention(
                qkv, kv, slots, positions, cos, sin, to, 8, 0.1, workspace=workspace, stream=stream(), pdl=pdl
            )  # fmt: skip
        assert positions.tolist() == [start + step, 1000 + step]
        assert torch.equal(early, late)
        wanted = reference(
            rotate(qkv[0].view(12, head_dim)[:8].double(), start + step, cos, sin, None), *kv[1], start + step + 1, 0, 0.1
        )  # fmt: skip
        assert torch.allclose(early[0].view(8, head_dim).double(), wanted, rtol=2**-7, atol=4e-3)
