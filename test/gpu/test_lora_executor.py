"""The CUDA executor with LoRA adapters computes what Hugging Face computes with the adapters merged into the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import ALL, ATTENTION, MLP, check_each_has_its_own_adapter, merged, projection, step, write_adapter

from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import Request, SamplingParams
from edgellm_ros.errors import RequestError
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.executors.lora import LoraTensors, make_adapter

RNG = np.random.default_rng(23)
Model = Callable[[str], tuple[Any, Path]]
OpenLora = Callable[..., CudaExecutor]


@pytest.fixture
def open_lora(gpu_bundle: Callable[..., Bundle]) -> Iterator[OpenLora]:
    opened: list[CudaExecutor] = []

    def get(kind: str, weights: str = "fp16", **settings: Any) -> CudaExecutor:
        config = EngineConfig(**{"max_slots": 4, "max_loras": 3, "max_lora_rank": 64, **settings})
        opened.append(CudaExecutor(gpu_bundle(kind, weights), config))
        return opened[-1]

    yield get
    for executor in opened:
        executor.close()


def dequantised(model: Any, bundle: Bundle) -> Any:
    """A copy of `model` with the weights that a quantised bundle stands for."""
    import torch

    from edgellm_ros.toolchain.quantize_weights import dequantize_int4

    quant, weights = bundle.manifest.quantization, bundle.weights()

    def values(stem: str, scheme: str) -> Any:
        stored, scales = weights[f"{stem}.weight"], weights[f"{stem}.scale"]
        if scheme == "int4":
            return torch.from_numpy(np.asarray(dequantize_int4(stored, scales, quant.group_size), np.float32).copy())
        groups = stored.astype(np.float32).reshape(len(stored), -1, quant.group_size)
        return torch.from_numpy((groups * scales.astype(np.float32)[:, :, None]).reshape(stored.shape))

    out = copy.deepcopy(model)
    stacks = {"attn.qkv": ALL[:3], "attn.o": ("o_proj",), "mlp.gate_up": MLP[:2], "mlp.down": ("down_proj",)}
    with torch.no_grad():
        for layer in range(len(out.model.layers)):
            for stem, targets in stacks.items():
                linears = [projection(out, layer, target) for target in targets]
                stacked = values(f"layers.{layer}.{stem}", quant.weights)
                for linear, part in zip(linears, stacked.split([len(li.weight) for li in linears]), strict=True):
                    linear.weight.copy_(part)
        out.model.embed_tokens.weight.copy_(values("embed", quant.embedding))
        out.lm_head.weight.copy_(values(quant.head_tensor(bundle.manifest.model), quant.lm_head))
    return out


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        rows: np.ndarray = model(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
    return rows


def prompt(length: int) -> np.ndarray:
    return RNG.integers(5, 300, length).astype(np.int32)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    centred = expected - expected.mean(-1, keepdims=True)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(centred))


def prefilled_and_decoded(executor: CudaExecutor, ids: np.ndarray, num_prefilled: int, adapter: int) -> np.ndarray:
    rows = [executor.step([step(1, ids[:num_prefilled], 0, num_prefilled, adapter)]).copy()]
    for i in range(num_prefilled, len(ids)):
        rows.append(executor.step([step(1, ids[i : i + 1], i, 1, adapter)]).copy())
    return np.concatenate(rows)


def assert_is_merged(executor: CudaExecutor, model: Any, path: Path) -> None:
    """The adapter is loaded as `a`."""
    ids = prompt(90)
    plain, expected = logits_of(model, ids), logits_of(merged(model, path), ids)
    assert relative_error(plain, expected) > 0.2, "an adapter that changes nothing tests nothing"
    got = prefilled_and_decoded(executor, ids, 60, executor.adapters["a"].index)
    assert relative_error(got[:60], expected[:60]) < 0.05
    assert relative_error(got[60:], expected[60:]) < 0.05
    assert relative_error(prefilled_and_decoded(executor, ids, 60, 0), plain) < 0.03


@pytest.mark.parametrize(
    "kind", ["gpu_llama", "gpu_llama_bias", "gpu_mistral", "gpu_qwen2", "gpu_qwen3", "gpu_gemma3"]
)
@pytest.mark.parametrize("batching", ["exact", "fast"])
def test_an_adapter_of_all_projections_is_the_merged_model(
    kind: str, batching: str, open_lora: OpenLora, gpu_model: Model, tmp_path: Path
) -> None:
    model, executor = gpu_model(kind)[0], open_lora(kind, decode_batching=batching)
    path = write_adapter(tmp_path / "a", model, dict.fromkeys(ALL, 8), 1)
    executor.load_adapter("a", path)
    assert_is_merged(executor, model, path)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "ranks",
    [
        {"q_proj": 1, "v_proj": 5},
        {"k_proj": 64, "o_proj": 16, "up_proj": 3},
        {"q_proj": 5, "k_proj": 8, "v_proj": 64, "gate_proj": 16, "up_proj": 1, "down_proj": 9},
        {"down_proj": 64},
    ],
)
def test_any_subset_of_projections_may_have_any_ranks(
    ranks: dict[str, int], rslora: bool, open_lora: OpenLora, gpu_model: Model, tmp_path: Path
) -> None:
    model, executor = gpu_model("gpu_llama")[0], open_lora("gpu_llama")
    path = write_adapter(tmp_path / "a", model, ranks, 2, rslora)
    executor.load_adapter("a", path)
    ids = prompt(60)
    expected = logits_of(merged(model, path), ids)
    got = prefilled_and_decoded(executor, ids, 40, 1)
    assert relative_error(got, expected) < 0.05
    assert relative_error(logits_of(model, ids), expected) > 0.06


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_an_adapter_adds_to_quantised_weights(
    weights: str, open_lora: OpenLora, gpu_bundle: Callable[..., Bundle], gpu_model: Model, tmp_path: Path
) -> None:
    model = dequantised(gpu_model("gpu_llama")[0], gpu_bundle("gpu_llama", weights))
    executor = open_lora("gpu_llama", weights)
    path = write_adapter(tmp_path / "a", model, dict.fromkeys(ALL, 16), 3)
    executor.load_adapter("a", path)
    assert_is_merged(executor, model, path)


@pytest.mark.parametrize("length", [8, 11])
def test_a_short_prompt_has_the_adapter_too(length: int, open_lora: OpenLora, gpu_model: Model, tmp_path: Path) -> None:
    """Eight tokens go through the decode kernels, and a draft of eleven; a prompt of eleven through products."""
    model, executor = gpu_model("gpu_qwen3")[0], open_lora("gpu_qwen3", decode_batching="fast")
    path = write_adapter(tmp_path / "a", model, dict.fromkeys(ALL, 8), 4)
    executor.load_adapter("a", path)
    ids, parents = prompt(length), np.arange(-1, length - 1, dtype=np.int32)
    plain = executor.verify_tree(1, 0, ids, parents).copy()  # of eleven nodes by products, though adapters are loaded
    assert relative_error(plain, logits_of(model, ids)) < 0.05
    expected = logits_of(merged(model, path), ids)
    for num_logits in (5, length):  # part of the logits is a prompt, all of them verify a draft: another graph
        got = executor.step([step(0, ids, 0, num_logits, 1)])
        assert relative_error(got, expected[-num_logits:]) < 0.05, num_logits
    tree = executor.verify_tree(0, 0, ids, parents, 1)
    assert relative_error(tree, expected) < 0.05


def test_an_exact_draft_has_the_bits_of_single_steps_with_its_adapter(two: CudaExecutor) -> None:
    ids, draft = prompt(20), prompt(5)
    for adapter in (2, 0, 1):
        two.step([step(0, ids, 0, 1, adapter)])
        single = np.concatenate([two.step([step(0, [t], 20 + i, 1, adapter)]).copy() for i, t in enumerate(draft)])
        assert np.array_equal(two.step([step(0, draft, 20, 5, adapter)]), single), adapter


@pytest.fixture
def two(open_lora: OpenLora, gpu_model: Model, tmp_path: Path) -> CudaExecutor:
    """An executor with adapters 1 (all projections) and 2 (attention only)."""
    executor = open_lora("gpu_qwen3", max_slots=8)
    model = gpu_model("gpu_qwen3")[0]
    executor.load_adapter("all", write_adapter(tmp_path / "all", model, dict.fromkeys(ALL, 8), 5))
    executor.load_adapter("attention", write_adapter(tmp_path / "attention", model, dict.fromkeys(ATTENTION, 16), 6))
    return executor


def test_each_sequence_of_a_batch_has_its_own_adapter_with_the_bits_that_it_has_alone(two: CudaExecutor) -> None:
    check_each_has_its_own_adapter(two, [0, 1, 2, 1, 2, 0, 0, 1], [prompt(20 + i) for i in range(8)])


def test_an_adapter_may_change_between_steps_and_graphs_follow(two: CudaExecutor) -> None:
    ids = prompt(20)
    two.step([step(0, ids, 0)])
    seen = {}
    for graphs in (True, False, True):
        two._decoder.use_graphs(graphs)
        for adapter in (1, 0, 2, 1, 0):
            row = two.step([step(0, [9], 20, 1, adapter)])[0].copy()
            assert np.array_equal(seen.setdefault(adapter, row), row), (graphs, adapter)
    assert relative_error(seen[1], seen[0]) > 0.05 and relative_error(seen[1], seen[2]) > 0.05


def test_a_run_on_the_device_gives_the_tokens_of_single_steps(two: CudaExecutor) -> None:
    adapters, lengths = [2, 0, 1], [13, 30, 21]
    for slot in range(3):
        two.step([step(slot, prompt(lengths[slot]), 0, 1, adapters[slot])])
    first = [7, 8, 9]
    single = []
    for slot in range(3):
        token, tokens = first[slot], []
        for i in range(20):
            token = int(two.step([step(slot, [token], lengths[slot] + i, 1, adapters[slot])])[0].argmax())
            tokens.append(token)
        single.append(tokens)
    run = two.decode_tokens([0, 1, 2], lengths, first, 20, adapters=adapters)
    assert run.T.tolist() == single
    plain = two.decode_tokens([0, 1, 2], lengths, first, 20)
    assert plain.T.tolist() != single, "without adapters the tokens are others"


def test_using_switching_and_replacing_adapters_takes_no_memory(two: CudaExecutor, tmp_path: Path) -> None:
    module = native.load()

    def use() -> None:
        for adapter in (0, 1, 2):
            two.step([step(0, prompt(40), 0, 1, adapter)])
            two.step([step(0, [5], 40, 1, adapter), step(1, [5], 3, 1, 2)])
            two.decode_tokens([0, 1], [41, 3], [5, 6], 10, adapters=[adapter, 2])

    use()
    before = module.allocation_count()
    use()
    two.unload_adapter("attention")
    two.load_adapter("attention again", tmp_path / "attention")
    use()
    assert module.allocation_count() == before


def test_a_freed_place_is_another_adapters(two: CudaExecutor, gpu_model: Model, tmp_path: Path) -> None:
    model = gpu_model("gpu_qwen3")[0]
    two.unload_adapter("all")
    with pytest.raises(ValueError, match="a step names adapter 1, which is not loaded"):
        two.step([step(0, [5], 0, 1, 1)])
    path = write_adapter(tmp_path / "next", model, {"o_proj": 5, "down_proj": 24}, 7)
    assert two.load_adapter("next", path).index == 1
    ids = prompt(60)
    assert relative_error(prefilled_and_decoded(two, ids, 40, 1), logits_of(merged(model, path), ids)) < 0.05


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(
    open_lora: OpenLora, gpu_model: Model, tmp_path: Path
) -> None:
    model, executor = gpu_model("gpu_llama")[0], open_lora("gpu_llama", max_loras=1, max_lora_rank=16)

    def adapter(target: str, rank: int, cols: int, rows: int, layer: int = 0) -> Any:
        a, b = np.ones((rank, cols), np.float32), np.ones((rows, rank), np.float32)
        return make_adapter((LoraTensors(layer, target, a, b, 1.0),))

    ids = prompt(20)

    def logits(adapter: int) -> np.ndarray:
        """Of a prompt's last token, and of one more."""
        return np.concatenate([executor.step([step(0, part, at, 1, adapter)]).copy() for part, at in ((ids, 0), ([9], 20))])

    before = logits(0)
    cases = [
        (adapter("q_proj", 17, 256, 256), r"layers\.0\.q_proj has rank 17; at most 16 .*max_lora_rank"),
        (adapter("q_proj", 4, 128, 256), r"layers\.0\.q_proj\.lora_A is \[4, 128\]; it must be \[rank, 256\]"),
        (adapter("k_proj", 4, 256, 256), r"layers\.0\.k_proj\.lora_B is \[256, 4\]; it must be \[128, 4\]"),
        (adapter("q_proj", 4, 256, 256, 3), r"layers\.3\.q_proj: the model has layers 0 to 2"),
        (adapter("qkv_proj", 4, 256, 256), r"layers\.0\.qkv_proj\.lora_B is \[256, 4\]; it must be \[512, 4\]"),
        (adapter("lm_head", 4, 256, 256), "no such projection; it has q_proj"),
    ]
    for wrong, what in cases:
        with pytest.raises(RequestError, match=what):
            executor.load_adapter("wrong", wrong)
    assert executor.adapters == {}
    assert np.array_equal(logits(0), before)
    path = write_adapter(tmp_path / "a", model, {"q_proj": 16}, 8)
    index = executor.load_adapter("a", path).index
    with_a = logits(index)
    assert np.array_equal(logits(0), before) and not np.array_equal(with_a, before)
    other = write_adapter(tmp_path / "b", model, {"q_proj": 16}, 9)
    with pytest.raises(RequestError, match="cannot be named 'a'"):
        executor.load_adapter("a", other)
    with pytest.raises(RequestError, match="has no place: max_loras is 1, loaded are a"):
        executor.load_adapter("b", other)
    with pytest.raises(RequestError, match="no adapter is named 'b'; loaded are a"):
        executor.unload_adapter("b")
    assert list(executor.adapters) == ["a"]
    assert np.array_equal(logits(index), with_a) and np.array_equal(logits(0), before)


def test_the_plan_counts_adapters_and_without_them_there_is_none(
    gpu_bundle: Callable[..., Bundle], open_lora: OpenLora
) -> None:
    executor = open_lora("gpu_llama", max_loras=2, max_lora_rank=5)  # padded to 8
    per_layer = 8 * (
        3 * 256 + 512 + 256 + 256 + 2 * 256 + 768 + 384 + 256
    )  # A (targets, in) and B (out) of each linear
    assert executor.memory_plan["adapters"] >= 2 * 3 * per_layer * 2
    assert executor.memory_plan["adapters"] < 2 * 3 * per_layer * 2 + 100_000
    plain = CudaExecutor(gpu_bundle("gpu_llama", "fp16"), EngineConfig())
    assert "adapters" not in plain.memory_plan
    plain.close()


def test_requests_name_adapters_and_share_nothing_between_them(
    gpu_bundle: Callable[..., Bundle], gpu_model: Model, tmp_path: Path
) -> None:
    from edgellm_ros.llm import LLM

    bundle, model = gpu_bundle("gpu_qwen3", "fp16"), gpu_model("gpu_qwen3")[0]
    config = EngineConfig(executor="cuda", max_loras=2, max_lora_rank=8)
    executor = CudaExecutor(bundle, config)
    executor.load_adapter("a", write_adapter(tmp_path / "a", model, dict.fromkeys(ALL, 8), 9))
    ids = tuple(int(i) for i in prompt(40))
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM.open(bundle, config, executor) as llm:
        first = {name: llm.complete(Request(prompt_ids=ids, sampling=sampling, lora=name)) for name in ("", "a")}
        assert [c.usage.cached_tokens for c in first.values()] == [0, 0]
        assert first[""].token_ids != first["a"].token_ids
        again = {name: llm.complete(Request(prompt_ids=ids, sampling=sampling, lora=name)) for name in ("a", "")}
        for name in ("", "a"):
            assert again[name].token_ids == first[name].token_ids and again[name].usage.cached_tokens > 0
        with pytest.raises(RequestError, match="lora is 'b'; loaded are: a"):
            llm.complete(Request(prompt_ids=ids, sampling=sampling, lora="b"))
