"""RoPE of queries and keys, head norms, and the write of keys and values, against fp64."""

from __future__ import annotations

import pytest
from kernel_case import AWKWARD, K, assert_untouched, needs_gpu, poisoned, random_bf16, stream, torch
from test_attention_decode import CAPACITY, EPS, FORMATS, WRITTEN, make_cache, plain, rotate, tables

pytestmark = needs_gpu


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("tokens", AWKWARD)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("as_f32", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_rope_rotates_queries_and_writes_keys_and_values(
    head_dim: int, tokens: int, normed: bool, as_f32: bool, form: str
) -> None:
    heads, kv_heads = 6, 2
    cos, sin = tables(head_dim)
    kv = make_cache(form, 3, 2, kv_heads, CAPACITY, head_dim)
    before = kv.clone()
    qkv = random_bf16(tokens, (heads + 2 * kv_heads) * head_dim)
    bias = torch.randn(qkv.shape[1], device="cuda")
    gains = [random_bf16(head_dim) for _ in range(2)] if normed else [None, None]
    slots = torch.full((tokens,), 1, device="cuda", dtype=torch.int32)
    positions = torch.arange(17, 17 + tokens, device="cuda", dtype=torch.int32)
    left_alone = {tokens // 2: -1, tokens // 4: CAPACITY} if tokens > 1 else {}
    for i, position in left_alone.items():
        positions[i] = position
    q_out = poisoned(tokens, heads * head_dim, dtype=torch.bfloat16)
    source = qkv.float() if as_f32 else qkv
    K.rope_kv_write(
        source, kv, slots, positions, cos, sin, q_out, heads, bias, *gains, EPS, stream=stream()
    )  # fmt: skip
    rows = (qkv.double() + bias.double()).view(tokens, -1, head_dim)
    for i in left_alone:
        assert bool(torch.isnan(q_out[i]).all())
    for i in sorted({0, 1, tokens // 3, tokens - 2, tokens - 1} & set(range(tokens))):
        assert i not in left_alone
        q, key, value = rows[i].split([heads, kv_heads, kv_heads])
        position = 17 + i
        wanted = rotate(q, position, cos, sin, gains[0])
        assert torch.allclose(q_out[i].view(heads, head_dim).double(), wanted, rtol=2**-8, atol=1e-5)
        relative, absolute = WRITTEN[form]
        for part, expected in enumerate((rotate(key, position, cos, sin, gains[1]), value)):
            written = plain(kv[1, part, :, position])
            assert torch.allclose(written, expected, rtol=relative, atol=max(absolute, 1e-5))
    untouched = torch.ones(CAPACITY, dtype=torch.bool)
    untouched[[17 + i for i in range(tokens) if i not in left_alone]] = False
    assert torch.equal(kv[1][:, :, untouched], before[1][:, :, untouched])
    assert torch.equal(kv[[0, 2]], before[[0, 2]])
    assert_untouched(q_out)


@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_rope_applies_a_products_scales_before_the_bias(head_dim: int) -> None:
    heads, kv_heads, tokens = 6, 2, 19
    cos, sin = tables(head_dim)
    kv = random_bf16(1, 2, kv_heads, CAPACITY, head_dim)
    qkv = random_bf16(tokens, (heads + 2 * kv_heads) * head_dim)
    bias = torch.randn(qkv.shape[1], device="cuda")
    row_scales = torch.rand(tokens, device="cuda") + 0.5
    column_scales = torch.rand(qkv.shape[1], device="cuda") + 0.1
    slots = torch.zeros(tokens, device="cuda", dtype=torch.int32)
    positions = torch.arange(tokens, device="cuda", dtype=torch.int32)
    q_out = poisoned(tokens, heads * head_dim, dtype=torch.bfloat16)
    K.rope_kv_write(
        qkv, kv, slots, positions, cos, sin, q_out, heads, bias, stream=stream(), row_scales=row_scales,
        column_scales=column_scales,
    )  # fmt: skip
    scaled = qkv.double() * row_scales.double()[:, None] * column_scales.double() + bias.double()
    for i, row in enumerate(scaled.view(tokens, -1, head_dim)):
        q, key, value = row.split([heads, kv_heads, kv_heads])
        turned = [rotate(x, i, cos, sin, None) for x in (q, key)]
        got = (q_out[i].view(heads, head_dim), *kv[0, :, :, i])
        for rows, wanted in zip(got, (*turned, value), strict=True):
            assert torch.allclose(rows.double(), wanted, rtol=2**-8, atol=1e-5)
    assert_untouched(q_out)
