"""How a prompt is cut into chunks, and which tokens its last layer is computed for as a whole. Needs no GPU."""

from __future__ import annotations

import pytest

from edgellm_ros import native

NATIVE, NO_MODULE = native.import_module()
pytestmark = pytest.mark.skipif(bool(NO_MODULE), reason=NO_MODULE)
MOST = 64


@pytest.mark.parametrize("products", [False, True])
def test_chunks_have_every_token_once_and_the_logits_of_the_last_ones(products: bool) -> None:
    for length in (2, 3, 16, 63, 64, 65, 66, 127, 128, 129, 130, 193, 1000):
        for num_logits in sorted({0, 1, 2, 15, 17, 64, 70, length} & set(range(length + 1))):
            chunks = NATIVE.cut_prompt(length, num_logits, MOST, products)
            tokens = [start + i for start, count, _, _ in chunks for i in range(count)]
            assert tokens == list(range(length))
            wanted = [start + count - n + i for start, count, n, _ in chunks for i in range(n)]
            assert wanted == list(range(length - num_logits, length)), (length, num_logits, chunks)
            for _, count, n, last_rows in chunks:
                assert count <= MOST and n <= last_rows <= count
                assert not products or count >= 2, chunks  # cuBLASLt's algorithms are chosen for two rows and more
                assert last_rows == (0 if n == 0 else min(count, max(n, 16)) if products else n)


def test_only_a_chunk_that_would_leave_one_token_is_shorter() -> None:
    assert NATIVE.cut_prompt(129, 1, MOST, True) == [(0, 64, 0, 0), (64, 63, 0, 0), (127, 2, 1, 2)]
    assert NATIVE.cut_prompt(129, 1, MOST, False) == [(0, 64, 0, 0), (64, 64, 0, 0), (128, 1, 1, 1)]
    assert NATIVE.cut_prompt(130, 1, MOST, True) == [(0, 64, 0, 0), (64, 64, 0, 0), (128, 2, 1, 2)]
    assert NATIVE.cut_prompt(120, 1, MOST, True) == [(0, 64, 0, 0), (64, 56, 1, 16)]


def test_chunks_of_fewer_tokens_than_a_decode_kernel_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens is 0; it must be at least 16"):
        NATIVE.cut_prompt(10, 1, 0, True)
