"""What a test draws depends on its name alone, not on what ran before it in the same process (test/conftest.py)."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(3)


@pytest.mark.parametrize("again", range(2))
def test_a_modules_generator_is_set_by_the_tests_name(again: int, request: pytest.FixtureRequest) -> None:
    named = [zlib.crc32(text.encode()) for text in (request.node.nodeid, "unit/test_draws.py")]
    assert np.array_equal(RNG.random(5), np.random.default_rng(named).random(5))


@pytest.mark.parametrize("again", range(2))
def test_torchs_generator_is_set_by_the_tests_name(again: int, request: pytest.FixtureRequest) -> None:
    named = torch.Generator().manual_seed(zlib.crc32(request.node.nodeid.encode()))
    assert torch.equal(torch.rand(5), torch.rand(5, generator=named))
