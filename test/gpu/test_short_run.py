"""Every path of the CUDA runtime once, on models small enough for compute-sanitizer (`tools/sanitize.py`).

Elsewhere each is tested against its oracle; here the same work is done alone and among others, and must agree.
Each part says its name and seconds as it ends, so that of a run that was cut off one sees what there was.

EDGELLM_SHORT_RUN holds what is left out (`_leave_out`), EDGELLM_SHORT_RUN_BUNDLES a directory where bundles are kept.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from test_executor_contract import prompt, step

from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import SamplingParams
from edgellm_ros.executors import RunSequence, SequenceStep, cuda
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.executors.lora import LoraTensors, make_adapter
from edgellm_ros.toolchain.export import export_bundle

EVERYTHING = SamplingParams(
    temperature=0.9, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.2, frequency_penalty=0.1,
    logit_bias={7: 1.5}, logprobs=3, seed=4,
)  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, seed=1)
PLAIN = SamplingParams(temperature=0.8, top_k=20, seed=2)


# kind, weights, KV cache, decode_batching; weights that others quantised are named by their packer. Only "fast" has the
# kernels of a single token.
CASES = [
    ("short_llama", "int4", "auto", "exact"), ("short_llama", "int4", "auto", "fast"),
    ("short_qwen3", "fp16", "auto", "exact"), ("short_mistral", "int8", "auto", "exact"),
    ("short_gemma3", "int4", "auto", "exact"), ("short_gemma3", "fp16", "fp8", "fast"),
    ("short_llama_bias", "fp8_rows", "bf16", "fast"), ("short_qwen3", "int4_order", "fp8", "exact"),
]  # fmt: skip
PACKED: dict[str, tuple[Any, Any]] = {
    "fp8_rows": (packers.ct_fp8(True),
                 packers.ct_config("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"})),
    "int4_order": (packers.gptq(32, 4, False, True), packers.gptq_config(32, 4, False, True)),
}  # fmt: skip


@pytest.fixture
def bundle_of(
    gpu_model: Callable[[str], tuple[Any, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], Bundle]:
    """`bundle_of("short_llama", "int4")`, made by the first process that asks: under a tool that takes much longer."""

    def get(kind: str, weights: str) -> Bundle:
        kept = os.environ.get("EDGELLM_SHORT_RUN_BUNDLES")
        output = Path(kept or tmp_path) / f"{kind}-{weights}"
        if not output.is_dir():
            model, source = gpu_model(kind)
            if weights in PACKED:
                monkeypatch.setattr(packers, "make_model", lambda _: copy.deepcopy(model))
                packers.save_quantized(kind, tmp_path / "source", *PACKED[weights])
                source = tmp_path / "source"
            made = output.with_name(f"{output.name}.{os.getpid()}")
            export_bundle(source, made, **({} if weights in PACKED else {"weights": weights}))
            with contextlib.suppress(OSError):  # another process was faster: its bundle is the same
                made.rename(output)
        return Bundle.open(output)

    return get


@pytest.mark.parametrize(("kind", "weights", "kv_cache", "batching"), CASES)
def test_every_path_once(
    kind: str, weights: str, kv_cache: str, batching: str, bundle_of: Callable[[str, str], Bundle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def same(got: np.ndarray, expected: np.ndarray) -> bool:
        if batching == "exact":
            return np.array_equal(got, expected)
        return bool(np.linalg.norm(got - expected) < 0.05 * np.linalg.norm(expected - expected.mean()))

    _leave_out(os.environ.get("EDGELLM_SHORT_RUN", ""), monkeypatch)
    part = _Parts()
    bundle = bundle_of(kind, weights)
    part.ends("bundle")
    config = EngineConfig(
        max_slots=2, max_context=128, prefill_chunk=48, kv_cache=kv_cache, max_loras=1, max_lora_rank=8,
        executor="cuda", decode_batching=batching,
    )  # fmt: skip
    executor = CudaExecutor(bundle, config)
    try:
        part.ends("load")
        prompts = [prompt(length) for length in (5, 60)]  # the second in two chunks
        firsts = [int(executor.step([step(slot, ids, 0)])[0].argmax()) for slot, ids in enumerate(prompts)]
        part.ends("prompts")
        together = executor.step(
            [step(slot, np.array([first], np.int32), len(prompts[slot])) for slot, first in enumerate(firsts)]
        ).copy()
        alone = executor.step([step(1, np.array([firsts[1]], np.int32), 60)])
        assert same(alone[0], together[1])
        part.ends("steps")

        run = executor.run
        assert run is not None
        for chosen in ((EVERYTHING, GREEDY), (PLAIN,)):  # few steps: a sampled one is by far the slowest under racecheck
            run.start(
                [
                    RunSequence(slot, len(prompts[slot]), [firsts[slot]], prompts[slot], params, int(params.seed or 0))
                    for slot, params in enumerate(chosen)
                ]
            )
            run.launch()
            run.launch()
            steps = [run.read(), run.read()]
            assert len(chosen) == 1 or batching == "fast" or steps[0].token_ids[1] == int(together[1].argmax())
            assert all(0 <= token < executor.info.vocab_size for read in steps for token in read.token_ids)
            part.ends("run")

        draft, parents = prompt(5), np.array([-1, 0, 0, 1, 2], np.int32)
        chain = executor.step([step(0, draft, 5, 5)]).copy()
        tree = executor.verify_tree(0, 5, draft, parents).copy()
        assert np.linalg.norm(tree[1] - chain[1]) < 0.1 * np.linalg.norm(chain[1] - chain[1].mean())
        executor.accept_path(0, 5, [0, 2, 4])
        if executor.max_tree_nodes >= 9:
            wide = executor.verify_tree(0, 5, prompt(9), np.array([-1, 0, 0, 1, 2, 2, 0, 5, 7], np.int32))
            assert np.isfinite(wide).all()
        part.ends("drafts")

        saved = executor.save_prefix(1, 60)
        executor.copy_prefix(1, 0, 20)
        executor.load_prefix(0, saved, 60)
        assert same(executor.step([step(0, np.array([firsts[1]], np.int32), 60)])[0], together[1])
        part.ends("prefixes")

        model = bundle.manifest.model
        generator = np.random.default_rng(3)
        shapes = (4, model.hidden_size), (model.num_heads * model.head_dim, 4)
        lora_a, lora_b = (generator.standard_normal(shape).astype(np.float32) for shape in shapes)
        loaded = executor.load_adapter("one", make_adapter((LoraTensors(0, "q_proj", lora_a, lora_b, 0.5),)))
        tokens = [np.array([first], np.int32) for first in firsts]
        adapted = executor.step(
            [SequenceStep(0, tokens[1], 60), SequenceStep(1, tokens[1], 60, 1, loaded.index)]
        )  # fmt: skip
        assert same(adapted[0], together[1])
        assert not np.array_equal(adapted[1], together[1])
        part.ends("adapters")
    finally:
        executor.close()


class _Parts:
    """Prints each part's seconds as it ends; `tools/sanitize.py` reads these lines."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def ends(self, name: str) -> None:
        now = time.monotonic()
        print(f"part {name} {now - self._since:.1f} s", flush=True)
        self._since = now


def _leave_out(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tool cannot follow: "no-pdl", "no-products" (cuBLASLt's); or "short": most drafts of 9 to 16 tokens."""
    settings_of = cuda._settings

    def settings(*arguments: Any) -> Any:
        settings = settings_of(*arguments)
        settings.pdl = "no-pdl" not in what
        if "no-products" in what:
            settings.min_gemm_tokens = 1 << 20
        if "short" in what:  # in exact mode, and without products, drafts of more have the kernels of eight, again
            settings.max_verify_tokens = 8 if settings.row_invariant or "no-products" in what else 16
        return settings

    monkeypatch.setattr(cuda, "_settings", settings)
