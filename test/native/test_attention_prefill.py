"""Prefill attention over a slot against fp64."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_case import AWKWARD, K, assert_untouched, needs_gpu, poisoned, random_bf16, stream, torch
from test_attention_decode import CAPACITY, FORMATS, make_cache, reference

pytestmark = needs_gpu


def hide(rows: Any) -> None:
    """Make NaN of what must never be read."""
    rows.fill_(0x7F if rows.dtype == torch.uint8 else float("nan"))


def check(
    head_dim: int, heads: int, kv_heads: int, sequences: list[tuple[int, int]], window: int = 0, form: str = "fp16"
) -> None:  # fmt: skip
    """`sequences`: (first position, tokens) each."""
    num_slots = len(sequences) + 1
    kv = make_cache(form, num_slots, 2, kv_heads, CAPACITY, head_dim)
    for i, (position, tokens) in enumerate(sequences):
        hide(kv[i + 1, :, :, position + tokens :])
    total = sum(tokens for _, tokens in sequences)
    q = random_bf16(total, heads * head_dim, scale=2.0)
    starts = [0]
    for _, tokens in sequences:
        starts.append(starts[-1] + tokens)
    ints = [
        torch.tensor(v, device="cuda", dtype=torch.int32)
        for v in (starts, range(1, num_slots), [position for position, _ in sequences])
    ]
    out = poisoned(total, heads * head_dim, dtype=torch.bfloat16)
    longest = max(tokens for _, tokens in sequences)
    K.prefill_attention(q, kv, *ints, out, longest, head_dim**-0.5, window, stream=stream())
    for i, (position, tokens) in enumerate(sequences):
        for j in sorted({0, 1, 62, 63, 64, tokens // 2, tokens - 1} & set(range(tokens))):
            row = q[starts[i] + j].view(heads, head_dim).double()
            wanted = reference(row, *kv[i + 1], position + j + 1, window, head_dim**-0.5)
            got = out[starts[i] + j].view(heads, head_dim).double()
            assert torch.allclose(got, wanted, rtol=2**-6, atol=8e-3), (i, j, float((got - wanted).abs().max()))
    assert not bool(torch.isnan(out).any())
    assert_untouched(out)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (9, 3), (8, 2), (14, 2)])
@pytest.mark.parametrize("form", FORMATS)
def test_every_head_dim_and_group_at_awkward_lengths(head_dim: int, heads: int, kv_heads: int, form: str) -> None:
    for tokens in AWKWARD:
        check(head_dim, heads, kv_heads, [(0, tokens)], form=form)
        check(head_dim, heads, kv_heads, [(37, tokens)], form=form)


@pytest.mark.parametrize("form", FORMATS)
def test_sequences_of_different_lengths_share_a_call(form: str) -> None:
    check(64, 9, 3, [(0, 99), (400, 1), (63, 130), (1000, 19), (0, 1)], form=form)
    check(128, 8, 2, [(0, 64), (64, 64), (1, 255)], form=form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("window", [1, 19, 64, 200])
def test_a_window_hides_what_lies_before_it(window: int, form: str) -> None:
    for head_dim in (64, 256):
        check(head_dim, 8, 2, [(0, 300), (500, 99)], window, form)


def attend(q: Any, kv: Any, position: int) -> Any:
    """One sequence in slot 0 whose first token is at `position`."""
    tokens, head_dim = q.shape[0], kv.shape[-1]
    starts, slots, positions = (
        torch.tensor(v, device="cuda", dtype=torch.int32) for v in ([0, tokens], [0], [position])
    )
    out = poisoned(tokens, q.shape[1], dtype=torch.bfloat16)
    K.prefill_attention(q, kv, starts, slots, positions, out, tokens, head_dim**-0.5, stream=stream())
    return out


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("form", FORMATS)
def test_a_long_prompt_has_the_bits_of_its_pieces(head_dim: int, form: str) -> None:
    """The whole fills a large GPU with large blocks, the pieces do not."""
    heads, kv_heads, tokens = 64, 16, 1100
    kv = make_cache(form, 1, 2, kv_heads, tokens, head_dim)
    q = random_bf16(tokens, heads * head_dim, scale=2.0)
    whole = attend(q, kv, 0)
    for first, last in ((0, 64), (64, 99), (99, 611), (611, 1100)):
        assert torch.equal(attend(q[first:last].clone(), kv, first), whole[first:last]), first


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("form", FORMATS)
def test_large_blocks_agree_with_fp64(head_dim: int, window: int, form: str) -> None:
    heads, kv_heads, position, tokens = 64, 16, 70, 1099
    kv = make_cache(form, 1, 2, kv_heads, position + tokens + 9, head_dim)
    hide(kv[:, :, :, position + tokens :])
    q = random_bf16(tokens, heads * head_dim, scale=2.0)
    ints = [torch.tensor(v, device="cuda", dtype=torch.int32) for v in ([0, tokens], [0], [position])]
    out = poisoned(tokens, heads * head_dim, dtype=torch.bfloat16)
    K.prefill_attention(q, kv, *ints, out, tokens, head_dim**-0.5, window, stream=stream())
    for j in (0, 1, 31, 32, 33, 500, 1097, 1098):
        wanted = reference(q[j].view(heads, head_dim).double(), *kv[0], position + j + 1, window, head_dim**-0.5)
        got = out[j].view(heads, head_dim).double()
        assert torch.allclose(got, wanted, rtol=2**-6, atol=8e-3), (j, float((got - wanted).abs().max()))
    assert not bool(torch.isnan(out).any())
    assert_untouched(out)
