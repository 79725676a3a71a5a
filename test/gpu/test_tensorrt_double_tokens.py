"""The tensorrt executor over the double of libnvinfer gives the cuda executor's tokens: prefill, decode, drafts, adapters.

A generation that starts from one token has the cuda executor's bits, greedy and sampled, for every step of it runs the
same kernels once norms read 16 bits (`use_the_double`) and the cache is bf16 (`double_steps.config`). Prompts go through
others, so behind them logits are compared within the rounding of bf16, and each token must be as likely as the cuda
executor's own choice within that.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import double_driver
import numpy as np
import pytest
from double_steps import CONTEXT, KINDS, config, needed, one, prompt, relative_error

from edgellm_ros.bundle import Bundle
from edgellm_ros.core import Request, SamplingParams
from edgellm_ros.errors import BundleError, DeviceError, UnsupportedError
from edgellm_ros.executors import Executor, SequenceStep
from edgellm_ros.llm import LLM

pytestmark = [
    pytest.mark.usefixtures("use_the_double"),
    pytest.mark.skipif(bool(double_driver.NO_DOUBLE), reason=double_driver.NO_DOUBLE),
]


@pytest.mark.parametrize("dialect", ["standard", "plugin"])
@pytest.mark.parametrize("kind", KINDS)
def test_single_tokens_have_the_bits_of_the_cuda_executor(
    kind: str, dialect: str, with_engine: Callable[..., Bundle], open_one: Callable[..., Executor]
) -> None:
    bundle = with_engine(kind, build={"dialect": needed(dialect)})
    tensorrt, cuda = open_one("tensorrt", bundle), open_one("cuda", bundle)
    ids = prompt(30)
    for i, token in enumerate(ids):
        assert np.array_equal(one(tensorrt, 2, [token], i), one(cuda, 2, [token], i)), i


@pytest.mark.parametrize("kind", ["gpu_llama", "gpu_mistral", "gpu_gemma3"])
def test_a_cache_in_fp8_has_the_cuda_executors_bits_too(
    kind: str, with_engine: Callable[..., Bundle], open_one: Callable[..., Executor]
) -> None:
    bundle = with_engine(kind, build={"dialect": needed("plugin"), "kv_cache": "fp8"})
    tensorrt, cuda = (open_one(name, bundle, kv_cache="fp8") for name in ("tensorrt", "cuda"))
    assert "fp8 KV cache" in tensorrt.info.precision
    assert tensorrt.info.kv_bytes_per_token == cuda.info.kv_bytes_per_token
    ids = prompt(60)
    for i in range(30):
        assert np.array_equal(one(tensorrt, 2, ids[i : i + 1], i), one(cuda, 2, ids[i : i + 1], i)), i
    assert np.array_equal(tensorrt.save_prefix(2, 30), cuda.save_prefix(2, 30))
    rows = [np.concatenate([one(e, 1, ids[:50], 0, 4), one(e, 1, ids[50:51], 50)]) for e in (tensorrt, cuda)]
    assert relative_error(rows[0], rows[1]) < 0.08
    tensorrt.copy_prefix(1, 3, 51)
    assert np.array_equal(one(tensorrt, 3, ids[51:52], 51), one(tensorrt, 1, ids[51:52], 51))


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 5}])
@pytest.mark.parametrize("batching", ["exact", "fast"])
def test_answers_that_start_from_one_token_are_the_cuda_executors(
    sampling: dict[str, Any], batching: str, with_engine: Callable[..., Bundle]
) -> None:
    bundle = with_engine("gpu_qwen3")
    answers = []
    for name in ("tensorrt", "cuda"):
        with LLM.open(bundle, config(name, decode_batching="exact" if name == "cuda" else batching)) as llm:
            params = SamplingParams(**sampling, max_tokens=60, ignore_eos=True)
            running = [llm.submit(Request(prompt_ids=(first,), sampling=params)) for first in (7, 90, 201)]
            answers.append([generation.result().token_ids for generation in running])
    assert answers[0] == answers[1] and all(len(ids) == 60 for ids in answers[0])


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_drafts_have_its_logits_within_rounding(
    kind: str, weights: str, with_engine: Callable[..., Bundle], open_one: Callable[..., Executor]
) -> None:
    bundle = with_engine(kind, weights)
    tensorrt, cuda = open_one("tensorrt", bundle), open_one("cuda", bundle)
    ids = prompt(90)
    rows = []
    for executor in (tensorrt, cuda):
        got = [one(executor, 1, ids[:70], 0, 4), one(executor, 1, ids[70:75], 70, 5)]  # a prompt in chunks, then a draft
        got += [one(executor, 1, ids[i : i + 1], i) for i in range(75, 90)]
        rows.append(np.concatenate(got))
    assert relative_error(rows[0], rows[1]) < 0.03


def test_each_token_behind_a_prompt_is_as_likely_as_the_cuda_executors_choice(
    with_engine: Callable[..., Bundle], open_one: Callable[..., Executor]
) -> None:
    bundle = with_engine("gpu_qwen3")
    ids = prompt(40)
    with LLM.open(bundle, config("tensorrt")) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        tokens = llm.complete(Request(prompt_ids=tuple(map(int, ids)), sampling=greedy)).token_ids
    cuda = open_one("cuda", bundle)
    rows = one(cuda, 0, np.concatenate([ids, np.asarray(tokens[:-1], np.int32)]), 0, len(tokens))
    best, chosen = rows.max(-1), rows[np.arange(len(tokens)), list(tokens)]
    assert (best - chosen <= 0.15 * rows.std(-1)).all()


def test_prefixes_are_copied_saved_and_restored(
    with_engine: Callable[..., Bundle], open_one: Callable[..., Executor]
) -> None:
    executor = open_one("tensorrt", with_engine())
    ids = prompt(20)
    one(executor, 0, ids, 0)
    expected = one(executor, 0, [9], 20)
    executor.copy_prefix(0, 3, 20)
    assert np.array_equal(one(executor, 3, [9], 20), expected)
    saved = executor.save_prefix(0, 20).copy()
    one(executor, 0, prompt(30), 0)
    executor.load_prefix(0, saved, 20)
    assert np.array_equal(one(executor, 0, [9], 20), expected)


def test_an_adapter_is_the_cuda_executors_too(
    gpu_model: Any, with_engine: Callable[..., Bundle], open_one: Callable[..., Executor], tmp_path: Path
) -> None:
    from adapters import ALL, write_adapter

    from edgellm_ros.toolchain.export import export_bundle

    model, checkpoint = gpu_model("gpu_llama")
    exported = export_bundle(checkpoint, tmp_path / "exported", weights="fp16", max_lora_rank=8)
    bundle = with_engine(bundle=exported, build={"lora": True})
    paths = [write_adapter(tmp_path / f"adapter{seed}", model, dict.fromkeys(ALL, 8), seed=seed) for seed in (3, 4)]
    rows = []
    ids = prompt(24)
    for name in ("tensorrt", "cuda"):
        executor = open_one(name, bundle, max_loras=2, max_lora_rank=8)
        places = [0, *(executor.load_adapter(path.name, path).index for path in paths)]
        for slot, place in enumerate(places):
            one(executor, slot, ids[:20], 0, 1, place)
        steps = []
        for i in range(20, 24):  # three sequences, each with another adapter or none, in one step
            batch = [SequenceStep(slot, ids[i : i + 1], i, 1, place) for slot, place in enumerate(places)]
            steps.append(executor.step(batch).copy())
        rows.append(np.stack(steps, 1))
    assert relative_error(rows[0], rows[1]) < 0.05
    assert min(relative_error(rows[1][0], rows[1][i]) for i in (1, 2)) > 0.2, "adapters that change nothing test nothing"


def test_an_engine_that_takes_adapters_runs_without_any(
    gpu_model: Any, with_engine: Callable[..., Bundle], open_one: Callable[..., Executor], tmp_path: Path
) -> None:
    from edgellm_ros.toolchain.export import export_bundle

    exported = export_bundle(gpu_model("gpu_llama")[1], tmp_path / "exported", weights="fp16", max_lora_rank=8)
    bundle = with_engine(bundle=exported, build={"lora": True})
    tensorrt, cuda = open_one("tensorrt", bundle), open_one("cuda", bundle)
    for i, token in enumerate(prompt(10)):
        assert np.array_equal(one(tensorrt, 0, [token], i), one(cuda, 0, [token], i)), i


def test_an_engine_with_other_weights_fails_the_self_test(with_engine: Callable[..., Bundle]) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["layers.0.mlp.down.weight"] = np.ascontiguousarray(tensors["layers.0.mlp.down.weight"][::-1])

    with pytest.raises((BundleError, UnsupportedError), match=r"self-test|reference"):
        LLM.open(with_engine(spoil=spoil), config("tensorrt"))


def test_an_enqueue_that_fails_ends_the_executor_with_the_librarys_words(
    with_engine: Callable[..., Bundle], open_one: Callable[..., Executor]
) -> None:
    executor = open_one("tensorrt", with_engine(faults={"enqueue": 200}))
    with pytest.raises(DeviceError, match="told to fail"):
        for i in range(200):
            one(executor, 0, prompt(10 + i % 20), 0)
    with pytest.raises(DeviceError):
        one(executor, 0, [5], 0)


_TRAP = """
import sys
from pathlib import Path
sys.path[:0] = [{native!r}]
import edgellm_ros
edgellm_ros.__path__.append({check!r})
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import Request, SamplingParams
from edgellm_ros.errors import DeviceError
from edgellm_ros.llm import LLM
with LLM.open(Bundle.open({bundle!r}), EngineConfig(executor="tensorrt", max_slots=2, max_context={context})) as llm:
    answered = 0
    for i in range(400):
        try:
            llm.complete(Request(prompt_ids=(7, 8, 9), sampling=SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)))
            answered += 1
        except Exception as error:
            print(answered, type(error).__name__, error)
            break
"""


def test_a_device_error_in_the_middle_of_an_answer_is_reported_and_does_not_hang(
    with_engine: Callable[..., Bundle],
) -> None:
    """In a process of its own, whose GPU context the error ends. The error comes out of a graph's replay."""
    bundle = with_engine(faults={"execution_trap": 600})
    root = Path(__file__).resolve().parents[2]
    script = _TRAP.format(
        native=str(root), check=str(root / "build" / "native-check"), bundle=str(bundle.path), context=CONTEXT
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    answered, kind, words = done.stdout.split(maxsplit=2)
    assert int(answered) > 0 and kind == "DeviceError" and "cudaError" in words, (done.stdout, done.stderr[-2000:])
