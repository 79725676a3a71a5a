"""A plan that does not fit the GPU is refused with what would make it fit, and only with that."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from edgellm_ros.errors import ConfigError
from edgellm_ros.executors.cuda import _check_memory

PLAN = {"weights": 4_000_000_000, "kv_cache": 500_000_000, "workspace": 90_000_000, "total": 4_590_000_000}


def settings(kv_format: str) -> SimpleNamespace:
    return SimpleNamespace(
        max_adapters=0, kv_format=SimpleNamespace(name=kv_format), num_slots=4, capacity=4096,
        kv_bytes_per_token=30_000, max_tokens=512,
    )  # fmt: skip


def test_settings_are_named_where_settings_can_help() -> None:
    _check_memory(PLAN, PLAN["total"], settings("bf16"))
    with pytest.raises(ConfigError, match=r"4589 MB are free; lower max_slots, .* or set kv_cache to fp8$"):
        _check_memory(PLAN, 4_589_000_000, settings("bf16"))
    with pytest.raises(ConfigError, match=r"lower max_slots, max_context or prefill_chunk$"):
        _check_memory(PLAN, 4_589_000_000, settings("fp8"))


def test_weights_that_fit_with_no_settings_are_said_to_be_too_large() -> None:
    with pytest.raises(ConfigError, match=r"weights alone take 4000 MB .* 3900 MB are free; .*--weights int4"):
        _check_memory(PLAN, 3_900_000_000, settings("bf16"))
