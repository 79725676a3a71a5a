"""Both graphs with an adapter as input are the merged model, and the ONNX Runtime executor gives each sequence its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from adapters import (
    ALL,
    ATTENTION,
    FUSED,
    PATTERN,
    check_each_has_its_own_adapter,
    merged,
    peft_adapter,
    step,
    write_adapter,
)
from portable_session import portable_session
from test_export import hf_logits, quantised_model, relative_error
from tiny import make_model

from edgellm_ros.bundle import DECODER, DECODER_LORA, DECODER_ORT, DECODER_ORT_LORA, Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import ConfigError, RequestError, ToolchainError, UnsupportedError
from edgellm_ros.executors import Executor, create_executor
from edgellm_ros.executors.embedding import EmbeddingTable
from edgellm_ros.executors.lora import LoraTensors, make_adapter, read_adapter
from edgellm_ros.executors.lora_layout import open_packed, pack
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.lora import pack_adapter

RNG = np.random.default_rng(23)
TinyBundle = Callable[..., Bundle]
OpenLora = Callable[..., Executor]


@pytest.fixture
def open_lora(tiny_bundle: TinyBundle) -> Iterator[OpenLora]:
    opened: list[Executor] = []

    def get(kind: str, weights: str = "fp32", **settings: Any) -> Executor:
        config = EngineConfig(**{"executor": "onnxruntime", "max_slots": 4, "max_loras": 3, "max_lora_rank": 64, **settings})
        opened.append(create_executor(tiny_bundle(kind, weights, 64), config))
        return opened[-1]

    yield get
    for executor in opened:
        executor.close()


def prompt(length: int) -> np.ndarray:
    return RNG.integers(5, 300, length).astype(np.int32)


def prefilled_and_decoded(executor: Executor, ids: np.ndarray, num_prefilled: int, adapter: int) -> np.ndarray:
    rows = [executor.step([step(1, ids[:num_prefilled], 0, num_prefilled, adapter)]).copy()]
    for i in range(num_prefilled, len(ids)):
        rows.append(executor.step([step(1, ids[i : i + 1], i, 1, adapter)]).copy())
    return np.concatenate(rows)


def run_portable(bundle: Bundle, ids: np.ndarray, adapter: dict[str, np.ndarray]) -> np.ndarray:
    """Logits of every position from decoder.lora.onnx; `adapter` has the packed file's tensors."""
    session = portable_session(bundle.path / DECODER_LORA)
    graph = bundle.manifest.graph
    dtype = np.dtype(graph.activation_dtype)
    embeds = np.empty((len(ids), bundle.manifest.model.hidden_size), np.float32)
    EmbeddingTable(bundle).lookup(ids, embeds)
    feed = {
        graph.embeds: embeds[None].astype(dtype),
        graph.positions: np.arange(len(ids))[None],
        graph.write_indices: np.zeros(1, np.int64),
        graph.logit_indices: np.arange(len(ids)),
    }
    for item in session.get_inputs():
        if item.name in feed:
            continue
        if "lora" in item.name:
            empty = [size if isinstance(size, int) else 0 for size in item.shape]
            feed[item.name] = adapter.get(item.name, np.zeros(empty)).astype(dtype)
        else:
            feed[item.name] = np.zeros([1, item.shape[1], len(ids) + 3, item.shape[3]], dtype)
    return session.run([graph.logits], feed)[0]


@pytest.mark.parametrize("kind", ["llama_bias", "mistral", "gemma3", "phi3"])
def test_an_adapter_of_all_projections_is_the_merged_model(kind: str, open_lora: OpenLora, tmp_path: Path) -> None:
    model, executor = make_model(kind), open_lora(kind)
    path = write_adapter(tmp_path / "a", model, dict.fromkeys(FUSED if kind == "phi3" else ALL, 8), 1)
    loaded = executor.load_adapter("a", path)
    ids = prompt(70)
    plain, expected = hf_logits(model, ids), hf_logits(merged(model, path), ids)
    assert relative_error(plain, expected) > 0.2, "an adapter that changes nothing tests nothing"
    assert np.abs(prefilled_and_decoded(executor, ids, 50, loaded.index) - expected).max() < 2e-3
    assert np.abs(prefilled_and_decoded(executor, ids, 50, 0) - plain).max() < 1e-3


def test_pefts_own_adapter_and_merge_agree_to_1e_4(tiny_checkpoint: Callable[[str], Path], open_lora: OpenLora, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    peft = peft_adapter(tmp_path / "a", source, rank_pattern=PATTERN, use_rslora=True)
    with torch.no_grad():  # PEFT's random B is large: a tenth of it keeps logits where 1e-4 can be asked for
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter *= 0.1
    peft.save_pretrained(tmp_path / "a")
    ids = prompt(60)
    with torch.no_grad():
        unmerged = peft(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()
    expected = hf_logits(peft.merge_and_unload(), ids)
    executor = open_lora("llama")
    got = prefilled_and_decoded(executor, ids, 40, executor.load_adapter("a", tmp_path / "a").index)
    assert relative_error(hf_logits(make_model("llama"), ids), expected) > 0.05
    for reference in (unmerged, expected):
        assert np.abs(got - reference).max() / np.abs(reference).max() < 1e-4
        assert np.array_equal(got.argmax(-1), reference.argmax(-1))


@pytest.mark.parametrize(
    ("ranks", "rslora"),
    [
        ({"q_proj": 1, "v_proj": 5}, False),
        ({"k_proj": 64, "o_proj": 16, "up_proj": 3}, True),
        ({"q_proj": 5, "k_proj": 8, "v_proj": 64, "gate_proj": 16, "up_proj": 1, "down_proj": 9}, False),
        ({"down_proj": 64}, True),
    ],
)
def test_any_subset_of_projections_may_have_any_ranks(
    ranks: dict[str, int], rslora: bool, open_lora: OpenLora, tmp_path: Path
) -> None:
    model, executor = make_model("llama"), open_lora("llama")
    path = write_adapter(tmp_path / "a", model, ranks, 2, rslora)
    executor.load_adapter("a", path)
    ids = prompt(40)
    expected = hf_logits(merged(model, path), ids)
    assert np.abs(prefilled_and_decoded(executor, ids, 30, 1) - expected).max() < 2e-3
    assert relative_error(hf_logits(model, ids), expected) > 0.05


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_an_adapter_adds_to_quantised_weights_in_both_graphs(
    weights: str, tiny_bundle: TinyBundle, open_lora: OpenLora, tmp_path: Path
) -> None:
    bundle = tiny_bundle("qwen3", weights, 64)
    model = quantised_model("qwen3", weights, bundle.manifest.quantization.group_size)
    path = write_adapter(tmp_path / "a", model, dict.fromkeys(ALL, 16), 3)
    ids = prompt(60)
    expected = hf_logits(merged(model, path), ids)
    executor = open_lora("qwen3", weights)
    executor.load_adapter("a", path)
    # As without adapters (test_export.py): MatMulNBits rounds activations to int8, the portable graph to fp16.
    bound = 0.005 if weights == "fp16" else 0.08
    assert relative_error(prefilled_and_decoded(executor, ids, 40, 1), expected) < bound
    tensors, _ = pack(read_adapter(path), bundle.manifest.model)
    assert relative_error(run_portable(bundle, ids, tensors), expected) < 0.02
    assert relative_error(run_portable(bundle, ids, {}), hf_logits(model, ids)) < 0.01


@pytest.mark.parametrize("rank", [0, 8, 64])
def test_the_portable_graph_takes_any_rank_and_is_valid(rank: int, tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    bundle, model = tiny_bundle("llama", "fp32", 64), make_model("llama")
    onnx.checker.check_model(str(bundle.path / DECODER_LORA), full_check=True)
    tensors: dict[str, np.ndarray] = {}
    if rank:
        path = write_adapter(tmp_path / "a", model, dict.fromkeys(ALL, rank), 4)
        tensors, _ = pack(read_adapter(path), bundle.manifest.model)
        model = merged(model, path)
    ids = prompt(50)
    assert np.abs(run_portable(bundle, ids, tensors) - hf_logits(model, ids)).max() < 1e-3


def test_the_contract_in_the_manifest_names_the_lora_inputs(tiny_bundle: TinyBundle) -> None:
    bundle = tiny_bundle("llama", "int4", 64)
    names, layers = bundle.manifest.graph, range(bundle.manifest.model.num_layers)
    stems = ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")
    wanted = {n.format(layer=i, stem=s) for n in (names.lora_a, names.lora_b) for i in layers for s in stems}
    for plain, with_lora in ((DECODER, DECODER_LORA), (DECODER_ORT, DECODER_ORT_LORA)):
        graphs = [onnx.load(bundle.file(name), load_external_data=False).graph for name in (plain, with_lora)]
        before, after = ({i.name for i in graph.input} for graph in graphs)
        assert after - before == wanted and before < after
    assert names.max_lora_rank == 64
    without = tiny_bundle("llama", "int4")
    assert not without.has(DECODER_LORA) and not without.has(DECODER_ORT_LORA)


@pytest.fixture
def two(open_lora: OpenLora, tmp_path: Path, request: pytest.FixtureRequest) -> Executor:
    """An executor with adapters 1 (all projections) and 2 (attention only)."""
    executor = open_lora("qwen3", getattr(request, "param", "fp32"), max_slots=8)
    model = make_model("qwen3")
    executor.load_adapter("all", write_adapter(tmp_path / "all", model, dict.fromkeys(ALL, 8), 5))
    executor.load_adapter("attention", write_adapter(tmp_path / "attention", model, dict.fromkeys(ATTENTION, 16), 6))
    return executor


@pytest.mark.parametrize("two", ["fp32", "int8", "int4"], indirect=True)
def test_each_sequence_of_a_batch_has_its_own_adapter_with_the_bits_that_it_has_alone(two: Executor) -> None:
    check_each_has_its_own_adapter(two, [0, 1, 2, 2, 2, 0, 0, 1], [prompt(20 + i) for i in range(8)])


@pytest.mark.parametrize("two", ["fp32", "int4"], indirect=True)
def test_any_chunking_of_a_prompt_gives_the_same_bits_with_an_adapter(two: Executor) -> None:
    ids = prompt(60)
    for adapter in (1, 2):
        whole = two.step([step(0, ids, 0, 1, adapter)]).copy()
        for cuts in ((30,), (2, 4, 50), (58,)):
            position = 0
            for part in np.split(ids, cuts):
                last = two.step([step(1, part, position, 1, adapter)]).copy()
                position += len(part)
            assert np.array_equal(last, whole), (adapter, cuts)


def test_without_an_adapter_the_bits_are_those_of_the_plain_decoder(two: Executor, tiny_bundle: TinyBundle) -> None:
    plain = create_executor(tiny_bundle("qwen3"), EngineConfig(executor="onnxruntime", max_slots=8))
    ids = prompt(30)
    assert np.array_equal(two.step([step(0, ids, 0, 5)]), plain.step([step(0, ids, 0, 5)]))
    assert np.array_equal(two.step([step(0, [7], 30)]), plain.step([step(0, [7], 30)]))
    plain.close()


def test_a_freed_place_is_another_adapters(two: Executor, tmp_path: Path) -> None:
    model, ids = make_model("qwen3"), prompt(40)
    two.step([step(0, ids, 0, 1, 1)])
    two.unload_adapter("all")
    with pytest.raises(AssertionError, match="names adapter 1, which is not loaded"):
        two.step([step(0, [5], 0, 1, 1)])
    path = write_adapter(tmp_path / "next", model, {"o_proj": 5, "down_proj": 24}, 7)
    assert two.load_adapter("next", path).index == 1
    assert np.abs(prefilled_and_decoded(two, ids, 30, 1) - hf_logits(merged(model, path), ids)).max() < 2e-3


def test_a_bundles_packed_adapter_is_the_directorys(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    root = shutil.copytree(tiny_bundle("llama", "fp32", 64).path, tmp_path / "bundle")
    path = write_adapter(tmp_path / "pick", make_model("llama"), {"q_proj": 3, "v_proj": 7, "up_proj": 2}, 8)
    pack_adapter(path, Bundle.open(root))
    bundle = Bundle.open(root)
    executor = create_executor(bundle, EngineConfig(executor="onnxruntime", max_loras=2, max_lora_rank=8))
    ids = prompt(30)
    rows = []
    for name, source in (("packed", open_packed(bundle, "pick")), ("directory", path)):
        loaded = executor.load_adapter(name, source)
        rows.append(executor.step([step(0, ids, 0, 30, loaded.index)]).copy())
        assert loaded.fingerprint == (bundle.manifest.files["lora/pick.safetensors"].sha256 if name == "packed" else read_adapter(path).fingerprint)
    assert np.array_equal(*rows)
    executor.close()


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(open_lora: OpenLora, tmp_path: Path) -> None:
    executor = open_lora("llama", max_loras=1, max_lora_rank=16)

    def adapter(target: str, rank: int, cols: int, rows: int, layer: int = 0) -> Any:
        a, b = np.ones((rank, cols), np.float32), np.ones((rows, rank), np.float32)
        return make_adapter((LoraTensors(layer, target, a, b, 1.0),))

    cases = [
        (adapter("q_proj", 17, 64, 64), r"layers\.0\.q_proj has rank 17; at most 16 .*max_lora_rank"),
        (adapter("q_proj", 4, 32, 64), r"layers\.0\.q_proj\.lora_A is \[4, 32\]; it must be \[rank, 64\]"),
        (adapter("k_proj", 4, 64, 64), r"layers\.0\.k_proj\.lora_B is \[64, 4\]; it must be \[32, 4\]"),
        (adapter("q_proj", 4, 64, 64, 3), r"layers\.3\.q_proj: the model has layers 0 to 2"),
        (adapter("qkv_proj", 4, 64, 64), r"layers\.0\.qkv_proj\.lora_B is \[64, 4\]; it must be \[128, 4\]"),
        (adapter("lm_head", 4, 64, 64), "no such projection; it has q_proj"),
    ]
    for wrong, what in cases:
        with pytest.raises(RequestError, match=what):
            executor.load_adapter("wrong", wrong)
    assert executor.adapters == {}
    path = write_adapter(tmp_path / "a", make_model("llama"), {"q_proj": 16}, 8)
    executor.load_adapter("a", path)
    with pytest.raises(RequestError, match="cannot be named 'a'"):
        executor.load_adapter("a", path)
    with pytest.raises(RequestError, match="has no place: max_loras is 1, loaded are a"):
        executor.load_adapter("b", path)
    with pytest.raises(RequestError, match="no adapter is named 'b'; loaded are a"):
        executor.unload_adapter("b")


def test_a_bundle_without_lora_inputs_or_memory_says_what_to_do(
    tiny_bundle: TinyBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(executor="onnxruntime", max_loras=2, max_lora_rank=64)
    with pytest.raises(UnsupportedError, match="max_loras is 2, but .* no decoder that takes adapters.*--max-lora-rank"):
        create_executor(tiny_bundle("llama"), config)
    named = EngineConfig(executor="onnxruntime", max_loras=1, loras=("pick", "place"))
    with pytest.raises(UnsupportedError, match=r"asked for \(pick, place\), but .*--max-lora-rank 16 .*load it without them"):
        create_executor(tiny_bundle("llama"), named)
    plain = create_executor(tiny_bundle("llama", "fp32", 64), EngineConfig(executor="onnxruntime"))
    with pytest.raises(UnsupportedError, match="loaded with max_loras 0"):
        plain.load_adapter("a", tmp_path)
    plain.close()
    monkeypatch.setattr("edgellm_ros.executors.onnxruntime.available_memory", lambda: 1_000_000)
    with pytest.raises(ConfigError, match="2 MB for 2 adapters.*max_loras or max_lora_rank"):
        create_executor(tiny_bundle("llama", "fp32", 64), config)


def test_the_exports_rank_is_a_limit_and_has_one(
    tiny_bundle: TinyBundle, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    for rank in (-1, 65):
        with pytest.raises(ToolchainError, match=f"max-lora-rank is {rank}; allowed are 0 .* to 64"):
            export_bundle(tiny_checkpoint("llama"), tmp_path / "out", max_lora_rank=rank)
    small = export_bundle(tiny_checkpoint("llama"), tmp_path / "out", weights="fp16", max_lora_rank=4)
    path = write_adapter(tmp_path / "a", make_model("llama"), {"v_proj": 5}, 1)
    with pytest.raises(RequestError, match=r"layers\.0\.v_proj has rank 5; at most 4 .*larger --max-lora-rank"):
        pack_adapter(path, small)


def test_fast_decoding_runs_the_sequences_of_an_adapter_together(
    open_lora: OpenLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = open_lora("qwen3", max_slots=6, decode_batching="fast")
    model = make_model("qwen3")
    paths = [write_adapter(tmp_path / f"{i}", model, dict.fromkeys(ALL, 8), i) for i in (1, 2)]
    adapters = [0, *(executor.load_adapter(path.name, path).index for path in paths)]
    models = [model, *(merged(model, path) for path in paths)]
    ids = [prompt(20 + i) for i in range(6)]
    order = [adapters[i] for i in (0, 1, 1, 2, 0, 0)]
    for slot in range(6):
        executor.step([step(slot, ids[slot][:-1], 0, 1, order[slot])])
    runs: list[list[int]] = []
    run = executor._run  # type: ignore[attr-defined]
    monkeypatch.setattr(executor, "_run", lambda members, out: runs.append([m.slot for m in members]) or run(members, out))
    rows = executor.step([step(s, ids[s][-1:], len(ids[s]) - 1, 1, order[s]) for s in range(6)])
    assert runs == [[0], [1, 2], [3], [4, 5]]
    for slot in range(6):
        assert np.abs(rows[slot] - hf_logits(models[order[slot]], ids[slot])[-1]).max() < 2e-3, slot
