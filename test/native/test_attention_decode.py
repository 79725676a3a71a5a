"""Decode attention against fp64: every head_dim and group size, splits, windows, batches, slots and free places."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_case import K, assert_untouched, needs_gpu, poisoned, random_bf16, stream, torch

pytestmark = needs_gpu
CAPACITY = 1031
EPS = 1e-6


def tables(head_dim: int) -> tuple[Any, Any]:
    angles = torch.arange(CAPACITY, dtype=torch.float64)[:, None] * 0.03 ** torch.linspace(0, 1, head_dim // 2)
    return torch.cos(angles).float().cuda(), torch.sin(angles).float().cuda()


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
    keys = keys[:, first:length].double().repeat_interleave(group, 0)
    values = values[:, first:length].double().repeat_interleave(group, 0)
    weights = torch.softmax(torch.einsum("hd,hpd->hp", q, keys) * scale, dim=1)
    return torch.einsum("hp,hpd->hd", weights, values)


def check(
    head_dim: int, heads: int, kv_heads: int, positions: list[int], splits: int = 8, window: int = 0,
    normed: bool = False, fp8: bool = False,
) -> None:  # fmt: skip
    batch, num_slots = len(positions), len(positions) + 2
    cos, sin = tables(head_dim)
    kv = random_bf16(num_slots, 2, kv_heads, CAPACITY, head_dim)
    if fp8:
        kv = kv.to(torch.float8_e4m3fn).view(torch.uint8)

    def plain(cache: Any) -> Any:
        return cache.view(torch.float8_e4m3fn).float().double() if fp8 else cache.double()

    before = kv.clone()
    slots = torch.randperm(num_slots)[:batch]
    qkv = torch.randn((batch, heads + 2 * kv_heads, head_dim), device="cuda") * 2
    gains = [random_bf16(head_dim) + 1 for _ in range(2)] if normed else [None, None]
    out = poisoned(batch, heads * head_dim, dtype=torch.bfloat16)
    workspace = torch.zeros(
        K.decode_attention_workspace_bytes(batch, heads, head_dim), dtype=torch.uint8, device="cuda"
    )
    scale = head_dim**-0.5
    for _ in range(2):  # the second call finds the workspace as the first left it, and overwrites what it wrote
        K.decode_attention(
            qkv.view(batch, -1), kv, slots.int().cuda(), torch.tensor(positions, device="cuda", dtype=torch.int32),
            cos, sin, out, heads, scale, *gains, EPS, window, splits, workspace, stream=stream(),
        )  # fmt: skip
    for b, position in enumerate(positions):
        slot = int(slots[b])
        if position < 0:
            assert bool((out[b] == 0).all())
            continue
        q, key, value = qkv[b].double().split([heads, kv_heads, kv_heads])
        written = plain(kv)[slot, :, :, position]
        wanted_key = rotate(key, position, cos, sin, gains[1])
        tolerance = dict(rtol=2**-4, atol=2**-9) if fp8 else dict(rtol=2**-8, atol=1e-6)
        assert torch.allclose(written[0], wanted_key, **tolerance)
        assert torch.allclose(written[1], value, **tolerance)
        before[slot, :, :, position] = kv[slot, :, :, position]
        attended = reference(
            rotate(q, position, cos, sin, gains[0]), *plain(kv)[slot], position + 1, window, scale
        )  # fmt: skip
        assert torch.allclose(out[b].view(heads, head_dim).double(), attended, rtol=2**-7, atol=4e-3)
    assert torch.equal(kv, before)  # nothing else was written
    assert_untouched(out)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12])
@pytest.mark.parametrize("splits", [8, 1, 5, 64])
def test_every_head_dim_and_group_at_awkward_lengths(head_dim: int, group: int, splits: int) -> None:
    for position in (0, 1, 18, 98, 988):
        check(head_dim, 2 * group, 2, [position], splits)


@pytest.mark.parametrize("splits", [8, 3])
def test_sequences_of_different_lengths_and_free_places_share_a_batch(splits: int) -> None:
    check(64, 9, 3, [988, 0, -1, 130, 18, 511, 512, 1030], splits)
    check(128, 32, 8, [1030, -1, 7, 255, 256, 257, 98, 3], splits)


@pytest.mark.parametrize("splits", [8, 3])
@pytest.mark.parametrize("window", [1, 19, 256, 4096])
def test_a_window_hides_what_lies_before_it(window: int, splits: int) -> None:
    check(128, 8, 2, [0, 18, 255, 256, 988], splits, window)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("splits", [8, 3])
def test_head_norms_come_before_the_rotation(head_dim: int, splits: int) -> None:
    check(head_dim, 16, 8, [0, 99, 700], splits, normed=True)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("splits", [8, 3])
def test_an_fp8_cache_is_read_as_it_was_written(head_dim: int, splits: int) -> None:
    check(head_dim, 8, 2, [0, 99, 700], splits, fp8=True)


def test_a_sequence_alone_and_in_a_batch_gives_the_same_bits() -> None:
    kv = random_bf16(4, 2, 2, CAPACITY, 64)
    cos, sin = tables(64)
    qkv = torch.randn((4, 12 * 64), device="cuda")
    slots, positions = (torch.tensor(v, device="cuda", dtype=torch.int32) for v in ([2, 0, 3, 1], [500, 3, 77, 1000]))
    workspace = torch.zeros(K.decode_attention_workspace_bytes(4, 8, 64), dtype=torch.uint8, device="cuda")

    def run(rows: slice) -> Any:
        out = torch.empty((len(slots[rows]), 512), dtype=torch.bfloat16, device="cuda")
        K.decode_attention(
            qkv[rows], kv, slots[rows], positions[rows], cos, sin, out, 8, 0.125, workspace=workspace, stream=stream()
        )  # fmt: skip
        return out

    together = run(slice(0, 4))
    for b in range(4):
        assert torch.equal(run(slice(b, b + 1))[0], together[b])
