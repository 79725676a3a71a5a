"""How many splits decode attention has, and how many of them a block: numbers alone, without a GPU."""

from __future__ import annotations

import pytest
from kernel_case import NATIVE, NO_MODULE, K

pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(NO_MODULE))


def test_splits_follow_from_the_length_alone_and_fill_the_gpu() -> None:
    assert [K.decode_attention_splits(n, 16) for n in (1, 1024, 1025, 100_000)] == [8, 8, 16, 16]
    assert K.decode_attention_splits(5000, 64) == 64 and K.decode_attention_splits(2048, 64) == 16
    assert [K.decode_attention_most_splits(kv_heads, 132) for kv_heads in (32, 8, 4, 2, 1)] == [8, 16, 16, 32, 64]


def test_how_many_splits_a_block_has_follows_from_the_batch_and_the_gpu() -> None:
    def each(splits: int, rows: int, blocks_per_sm: int, num_sms: int = 132) -> int:
        return int(K.decode_attention_splits_per_block(splits, rows, num_sms, blocks_per_sm))

    # One to eight sequences with eight KV heads; about one and a half blocks a multiprocessor at most.
    assert [each(8, 8 * batch, 2) for batch in range(1, 9)] == [1, 1, 1, 2, 2, 2, 4, 4]
    assert [each(16, 8 * batch, 2) for batch in range(1, 9)] == [1, 2, 2, 4, 4, 4, 4, 4]
    assert each(8, 64, 3) == 2  # smaller blocks, of which three fit
    assert each(8, 1000, 2) == 4 and each(2, 1000, 2) == 2 and each(1, 1000, 2) == 1
    assert each(8, 8, 2, num_sms=16) == 4 and each(8, 2, 2, num_sms=16) == 1  # a Jetson
    # Of a long sequence's, as few waves as can be, and then few blocks.
    assert [each(16, 8 * batch, 1) for batch in range(1, 9)] == [1, 2, 1, 4, 1, 2, 1, 8]
    for rows in range(1, 257):
        waves = {n: -(-rows * 16 // n // 132) * n for n in (1, 2, 4, 8)}
        assert waves[each(16, rows, 1)] == min(waves.values())
