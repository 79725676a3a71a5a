"""Rows of the table arrive in the residual stream, in fp32 and bf16, by ids that only the device knows."""

from __future__ import annotations

import pytest
from kernel_case import AWKWARD, K, assert_untouched, make_weight, needs_gpu, poisoned, random_bf16, stream, torch

pytestmark = needs_gpu


@pytest.mark.parametrize("form", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize("tokens", AWKWARD)
@pytest.mark.parametrize("cols", [16, 576, 4096])
def test_rows_are_those_of_the_ids(form: str, tokens: int, cols: int) -> None:
    table = make_weight(form, 989, cols, group=16)
    ids = torch.randint(0, 989, (tokens,), device="cuda", dtype=torch.int32)
    ids[-1] = 988
    residual = poisoned(tokens, cols, dtype=torch.float32)
    copy = poisoned(tokens, cols, dtype=torch.bfloat16)
    K.embedding(table.view, ids, residual, copy, scale=2.5, stream=stream())
    assert torch.allclose(residual.double(), table.values[ids.long()] * 2.5, rtol=1e-6)
    assert torch.equal(copy, residual.to(torch.bfloat16))
    assert_untouched(residual)
    assert_untouched(copy)


def test_ids_outside_the_table_give_zeros() -> None:
    table = make_weight("bf16", 19, 64)
    residual, copy = (poisoned(2, 64, dtype=d) for d in (torch.float32, torch.bfloat16))
    K.embedding(table.view, torch.tensor([-1, 19], device="cuda", dtype=torch.int32), residual, copy, stream=stream())
    assert bool((residual == 0).all()) and bool((copy == 0).all())


@pytest.mark.parametrize("tokens", AWKWARD)
@pytest.mark.parametrize("hidden", [16, 577, 4096])
def test_embeddings_of_images_arrive_as_they_are(tokens: int, hidden: int) -> None:
    embeddings = random_bf16(tokens, hidden, scale=3.0)
    residual = poisoned(tokens, hidden, dtype=torch.float32)
    copy = poisoned(tokens, hidden, dtype=torch.bfloat16)
    K.embeddings_from_bf16(embeddings, residual, copy, stream=stream())
    assert torch.equal(residual, embeddings.float())
    assert torch.equal(copy, embeddings)
    assert_untouched(residual)
    assert_untouched(copy)
