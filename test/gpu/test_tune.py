"""`edgellm tune` on the GPU: any tile keeps exact decoding exact, and a tuned bundle answers as well as before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_executor_contract import prompt, step

from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.config import EngineConfig
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.executors.cuda_tiles import PRODUCTS


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["gpu_qwen2", "gpu_qwen3"])
def test_with_any_tile_a_sequence_gets_the_same_bits_alone_and_among_others(
    kind: str, weights: str, open_cuda: Callable[..., CudaExecutor]
) -> None:
    executor = open_cuda(kind, weights, max_slots=8)
    tokens, draft = prompt(8), prompt(5)
    for slot in range(8):
        executor.step([step(slot, prompt(20 + slot), 0)])

    def decode(*slots: int) -> np.ndarray:
        return executor.step([step(slot, tokens[slot : slot + 1], 20 + slot) for slot in slots]).copy()

    first = decode(3)
    most = max(executor.decoder.num_tiles(product, 1) for product in PRODUCTS)
    for tile in range(most):
        for product in PRODUCTS:
            count = executor.decoder.num_tiles(product, 1)
            assert count == executor.decoder.num_tiles(product, 8)
            executor.decoder.set_tile(product, 1, min(tile, count - 1))
        alone = decode(3)
        assert np.abs(alone - first).max() < 0.05 * np.abs(first).max()
        for others in ([3, 5], [0, 1, 2, 3, 4], list(range(8))):
            assert np.array_equal(decode(*others)[others.index(3)], alone[0]), (tile, others)
        chain = executor.step([step(3, draft, 23, 5)]).copy()
        assert np.array_equal(chain[0], executor.step([step(3, draft[:1], 23)])[0]), tile


@pytest.mark.parametrize("arguments", [[], ["--max-slots", "1"], ["--decode-batching", "fast", "--batch", "1", "3"]])
def test_a_tuned_bundle_loads_with_its_tiles_and_agrees_with_the_built_in_ones(
    arguments: list[str], gpu_bundle: Callable[..., Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(gpu_bundle("gpu_qwen3", "int4").path, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    fast = "fast" in arguments
    config = EngineConfig(
        executor="cuda", max_slots=1 if "1" in arguments and not fast else 4, max_context=128,
        decode_batching="fast" if fast else "exact",
    )  # fmt: skip
    ids, token = prompt(30), prompt(1)
    before = CudaExecutor(bundle, config).step([step(0, ids, 0)]).copy()
    assert main(["tune", str(bundle.path), "--tokens", "40", "--json", "--max-context", "128", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [result["batch"] for result in found["batches"]] == ([1, 3] if fast else [1])
    choices = [c for result in found["batches"] for c in result["choices"]]
    assert {c["product"] for c in choices} == set(PRODUCTS) and all(c["count"] > 0 for c in choices)
    executor = CudaExecutor(bundle, config)
    assert np.array_equal(executor.step([step(0, ids, 0)]), before)  # prompts have products of their own
    # Whatever was chosen: another valid tile for a product must be taken over from the file, too.
    path = Path(found["file"])
    changed = json.loads(path.read_text())
    mode, products = next(iter(changed["choices"].items()))
    for batches in products.values():
        for batch, (_, count) in batches.items():
            batches[batch] = [count - 1, count]
    path.write_text(json.dumps(changed))
    other = CudaExecutor(bundle, config)
    other.step([step(0, ids, 0)])
    executor.step([step(0, ids, 0)])
    one, two = (e.step([step(0, token, 30)]).copy() for e in (executor, other))
    assert np.abs(one - two).max() < 0.03 * np.abs(one).max(), mode
    assert main(["tune", str(bundle.path), "--forget"]) == 0 and not path.exists()
