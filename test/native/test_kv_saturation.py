"""Keys and values beyond what the cache's format holds become its largest number, whichever kernel writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from kernel_case import K, needs_gpu, poisoned, stream, torch
from test_attention_decode import FORMATS, make_cache, make_workspace, plain, stored

pytestmark = needs_gpu
LARGEST = {"fp16": 65504.0, "fp8": 448.0, "bf16": float("inf")}
CAPACITY = 8


def tables(kv: Any) -> tuple[Any, Any]:
    """No rotation."""
    shape = CAPACITY, kv.shape[-1] // 2
    return torch.ones(shape, device="cuda"), torch.zeros(shape, device="cuda")


def zeros(count: int = 1) -> Any:
    return torch.zeros(count, device="cuda", dtype=torch.int32)


def decode(qkv: Any, kv: Any, out: Any) -> None:
    K.decode_attention(
        qkv, kv, zeros(), zeros(), *tables(kv), out, 1, 0.125, workspace=make_workspace(1, 1, kv.shape[-1]),
        stream=stream(),
    )  # fmt: skip


def prompt(qkv: Any, kv: Any, out: Any) -> None:
    K.rope_kv_write(qkv, kv, zeros(), zeros(), *tables(kv), out, 1, stream=stream())


def prompt_in_bf16(qkv: Any, kv: Any, out: Any) -> None:
    prompt(qkv.to(torch.bfloat16), kv, out)


def tree(qkv: Any, kv: Any, out: Any) -> None:
    starts, mask = torch.arange(2, device="cuda", dtype=torch.int32), torch.ones(1, device="cuda", dtype=torch.int64)
    workspace = torch.zeros(K.tree_attention_workspace_bytes(1, 1, kv.shape[-1]), dtype=torch.uint8, device="cuda")
    K.tree_attention(
        qkv, kv, starts, zeros(), zeros(), zeros(), mask, *tables(kv), out, 1, 1, 0.125, workspace=workspace,
        stream=stream(),
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("write", [decode, prompt, prompt_in_bf16, tree])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_keys_and_values_beyond_the_format_become_its_largest(
    head_dim: int, write: Callable[[Any, Any, Any], None], form: str
) -> None:
    """Of both signs, from 1 to a million; bf16 cuts nothing."""
    sizes = torch.logspace(0, 6, head_dim, device="cuda").to(torch.bfloat16).float()
    sizes[::2] *= -1
    qkv = torch.stack([torch.zeros_like(sizes), sizes, -sizes])  # a query that likes all keys, a key, a value
    kv = torch.zeros_like(make_cache(form, 1, 2, 1, CAPACITY, head_dim))
    wanted = kv.clone()
    wanted[0, :, 0, 0] = stored(form, qkv[1:].clamp(-LARGEST[form], LARGEST[form]))
    out = poisoned(1, head_dim, dtype=torch.bfloat16)
    write(qkv.view(1, -1), kv, out)
    assert torch.equal(plain(kv), plain(wanted))
    largest = float(plain(wanted).abs().max())
    assert largest == min(LARGEST[form], 999_424.0)  # the million in bf16
    attended = torch.zeros_like(sizes) if write in (prompt, prompt_in_bf16) else plain(wanted)[0, 1, 0, 0]
    assert torch.equal(out[0], attended.to(torch.bfloat16))  # of prompts the query
