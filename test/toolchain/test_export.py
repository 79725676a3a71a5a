"""Exported bundles compute what Hugging Face's model computes, whatever the family, the file format and the graph."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from portable_session import portable_session
from tiny import FAMILIES, VOCAB_SIZE, make_model, save_checkpoint, save_gguf

from edgellm_ros.bundle import DECODER, WEIGHTS, Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import CheckpointError, ToolchainError
from edgellm_ros.executors.base import SequenceStep
from edgellm_ros.executors.embedding import EmbeddingTable
from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor
from edgellm_ros.manifest import GraphSpec
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.quantize.model import load_model, open_source
from edgellm_ros.toolchain.quantize_weights import dequantize_int4, quantize_int4, quantize_int8

NUM_GREEDY = 64
PROMPT = np.random.default_rng(5).integers(5, VOCAB_SIZE - 5, 80).astype(np.int32)  # longer than the sliding windows


def hf_logits(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids[None].astype(np.int64))).logits[0].float().numpy()


def hf_greedy(model: torch.nn.Module, ids: np.ndarray, count: int) -> list[int]:
    tokens = torch.from_numpy(ids[None].astype(np.int64))
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return out[0, len(ids) :].tolist()


def run_executor(bundle: Bundle, ids: np.ndarray, num_greedy: int = 0) -> tuple[np.ndarray, list[int]]:
    """Logits of every prompt position (in three chunks), and the greedy continuation."""
    executor = OnnxRuntimeExecutor(bundle, EngineConfig(max_slots=2, max_context=min(256, len(ids) + num_greedy + 8)))
    rows, position = [], 0
    for chunk in np.array_split(ids, 3):
        rows.append(executor.step([SequenceStep(1, chunk, position, len(chunk))]).copy())
        position += len(chunk)
    tokens: list[int] = []
    last = rows[-1][-1]
    for _ in range(num_greedy):
        tokens.append(int(last.argmax()))
        last = executor.step([SequenceStep(1, np.array(tokens[-1:], np.int32), position)])[0]
        position += 1
    executor.close()
    return np.concatenate(rows), tokens


def run_portable(bundle: Bundle, ids: np.ndarray) -> np.ndarray:
    """Logits of every position from decoder.onnx, in two calls over one cache."""
    session = portable_session(bundle.path / DECODER)
    model, graph = bundle.manifest.model, bundle.manifest.graph
    dtype = np.dtype(graph.activation_dtype)
    embeds = np.empty((len(ids), model.hidden_size), np.float32)
    EmbeddingTable(bundle).lookup(ids, embeds)
    pasts = [n.format(layer=i) for i in range(model.num_layers) for n in (graph.past_key, graph.past_value)]
    presents = [n.format(layer=i) for i in range(model.num_layers) for n in (graph.present_key, graph.present_value)]
    caches = [np.zeros((1, model.num_kv_heads, len(ids) + 5, model.head_dim), dtype) for _ in pasts]
    rows, start = [], 0
    for stop in (len(ids) // 2, len(ids)):
        feed = dict(zip(pasts, caches, strict=True))
        feed[graph.embeds] = embeds[None, start:stop].astype(dtype)
        feed[graph.positions] = np.arange(start, stop)[None]
        feed[graph.write_indices] = np.array([start])
        feed[graph.logit_indices] = np.arange(stop - start)
        logits, *caches = session.run([graph.logits, *presents], feed)
        rows.append(logits)
        start = stop
    return np.concatenate(rows)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", FAMILIES)
def test_fp32_logits_and_greedy_tokens_are_hugging_faces(kind: str, tiny_bundle: Callable[..., Bundle]) -> None:
    model = make_model(kind)
    logits, tokens = run_executor(tiny_bundle(kind, "fp32"), PROMPT, NUM_GREEDY)
    assert np.abs(logits - hf_logits(model, PROMPT)).max() < 3e-4
    assert tokens == hf_greedy(model, PROMPT, NUM_GREEDY)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_portable_graph_is_valid_onnx_and_agrees_with_hugging_face(
    kind: str, tiny_bundle: Callable[..., Bundle]
) -> None:
    bundle = tiny_bundle(kind, "fp32")
    onnx.checker.check_model(str(bundle.path / DECODER), full_check=True)
    assert {n.domain for n in onnx.load(bundle.path / DECODER, load_external_data=False).graph.node} == {""}
    assert np.abs(run_portable(bundle, PROMPT) - hf_logits(make_model(kind), PROMPT)).max() < 3e-4


@pytest.mark.parametrize("kind", ["llama_llama3", "llama_linear", "llama_yarn", "mistral", "qwen2", "qwen3", "smollm3"])
def test_a_gguf_file_gives_the_same_model(kind: str, tmp_path: Path) -> None:
    model = save_gguf(kind, tmp_path / "tiny.gguf")
    bundle = export_bundle(tmp_path / "tiny.gguf", tmp_path / "bundle", weights="fp32")
    assert np.abs(run_executor(bundle, PROMPT)[0] - hf_logits(model, PROMPT)).max() < 3e-4


def quantised_model(kind: str, scheme: str, group: int) -> torch.nn.Module:
    """Hugging Face's model with every stored weight replaced by what the bundle's numbers stand for."""
    model = make_model(kind)

    def apply(weight: torch.Tensor, how: str) -> None:
        array = weight.detach().numpy()
        if how == "int4":
            array = dequantize_int4(*quantize_int4(array, group), group)
        elif how == "int8":
            values, scales = quantize_int8(array, group)
            wide = values.reshape(len(values), -1, group) * scales.astype(np.float32)[..., None]
            array = wide.reshape(array.shape)
        else:
            array = array.astype(np.float16).astype(np.float32)
        weight.data = torch.from_numpy(np.ascontiguousarray(array))

    table = "fp16" if scheme == "fp16" else "int8"
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            apply(parameter, table if "embed" in name or "lm_head" in name else scheme)
    return model


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["llama_bias", "qwen2", "qwen3"])
def test_quantised_graphs_compute_with_the_dequantised_weights(
    kind: str, scheme: str, tiny_bundle: Callable[..., Bundle]
) -> None:
    bundle = tiny_bundle(kind, scheme)
    expected = hf_logits(quantised_model(kind, scheme, bundle.manifest.quantization.group_size), PROMPT)
    onnx.checker.check_model(str(bundle.path / DECODER), full_check=True)
    assert relative_error(run_portable(bundle, PROMPT), expected) < 0.01  # fp16 activations
    # MatMulNBits rounds activations to int8: that alone moves these logits by some per cent.
    assert relative_error(run_executor(bundle, PROMPT)[0], expected) < (0.005 if scheme == "fp16" else 0.08)


def test_smollm2_in_fp32_is_hugging_faces(smollm2: Callable[[str], Bundle], smollm2_transformers: torch.nn.Module) -> None:
    model = smollm2_transformers
    ids = np.random.default_rng(6).integers(100, 49000, 60).astype(np.int32)
    logits, tokens = run_executor(smollm2("fp32"), ids, NUM_GREEDY)
    assert np.abs(logits - hf_logits(model, ids)).max() < 3e-4
    assert tokens == hf_greedy(model, ids, NUM_GREEDY)


def test_one_weight_file_serves_both_graphs(tiny_bundle: Callable[..., Bundle]) -> None:
    bundle = tiny_bundle("llama_tied", "int4")
    weights = bundle.weights()
    ranges = {weights.location(name) for name in weights.names()}
    for name in (DECODER, "decoder.ort.onnx"):
        graph = onnx.load(bundle.path / name, load_external_data=False).graph
        external = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert external
        for tensor in external:
            where = {entry.key: entry.value for entry in tensor.external_data}
            assert where["location"] == WEIGHTS
            assert (int(where["offset"]), int(where["length"])) in ranges
    # The file is a valid safetensors file for others, too.
    assert set(safetensors.numpy.load_file(bundle.path / WEIGHTS)) == set(weights.names())
    assert "head.weight" not in weights, "a tied head is stored once"


def test_the_graph_contract_in_the_manifest_names_the_graphs_inputs(tiny_bundle: Callable[..., Bundle]) -> None:
    bundle = tiny_bundle("llama", "int8")
    spec: GraphSpec = bundle.manifest.graph
    inputs = {i.name for i in onnx.load(bundle.path / DECODER, load_external_data=False).graph.input}
    layers = range(bundle.manifest.model.num_layers)
    caches = {n.format(layer=i) for i in layers for n in (spec.past_key, spec.past_value)}
    assert inputs == caches | {spec.embeds, spec.positions, spec.write_indices, spec.logit_indices}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "int3"}, "weights is 'int3'; allowed are int4, int8, fp16, fp32, keep"),
        ({"max_context": 1000}, r"max-context is 1000; .* allows \d\d \(the self-test's prompts\) to 256"),
        ({"max_context": -5}, r"max-context is -5; .* allows \d\d \(the self-test's prompts\) to 256"),
        ({"max_context": 20}, r"max-context is 20; .* allows \d\d \(the self-test's prompts\) to 256"),
    ],
)
def test_impossible_options_are_refused_by_value_and_leave_nothing(
    changes: dict, message: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ToolchainError, match=message):
        export_bundle(tiny_checkpoint("llama"), tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_the_least_context_that_is_named_is_one_that_can_be_exported(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ToolchainError) as refused:
        export_bundle(tiny_checkpoint("llama"), tmp_path / "out", max_context=0)
    least = int(re.findall(r"allows (\d+)", str(refused.value))[0])
    with pytest.raises(ToolchainError, match=f"allows {least} "):
        export_bundle(tiny_checkpoint("llama"), tmp_path / "out", max_context=least - 1)
    assert export_bundle(tiny_checkpoint("llama"), tmp_path / "out", max_context=least).manifest.model.max_context == least


def test_an_original_that_is_not_there_is_said_before_the_export(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    exported: list[object] = []
    monkeypatch.setattr("edgellm_ros.toolchain.export.export_bundle", lambda *args, **options: exported.append(args))
    missing = tmp_path / "nosuch"
    command = ["export", str(tiny_checkpoint("llama")), "-o", str(tmp_path / "out"), "--verify", "--against", str(missing)]
    assert main(command) == 2
    assert not exported and f"{missing} does not exist" in capsys.readouterr().err


def test_a_model_without_stop_ids_is_exported_with_a_warning(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "source")
    assert main(["export", str(source), "-o", str(tmp_path / "one")]) == 0
    assert "warning" not in capsys.readouterr().err
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).is_file():
            kept = {k: v for k, v in json.loads((source / name).read_text()).items() if not k.startswith("eos_token")}
            (source / name).write_text(json.dumps(kept))
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert main(["export", str(source), "-o", str(tmp_path / "two")]) == 0
    assert "warning: the checkpoint names no token that ends an answer, so generation ends only at max_tokens; set " in (
        capsys.readouterr().err
    )
    assert not Bundle.open(tmp_path / "two").manifest.tokens.stop_ids


def test_weights_that_are_a_directory_are_named(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "source")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").mkdir()
    assert main(["export", str(source), "-o", str(tmp_path / "out")]) == 2
    message = f"error: {source / 'model.safetensors'} is not a file; download or copy the file again"
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_existing_bundle_is_replaced_only_when_told_and_anything_else_never(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    export_bundle(source, tmp_path / "bundle", weights="fp16")
    with pytest.raises(ToolchainError, match="exists; .*--force"):
        export_bundle(source, tmp_path / "bundle", weights="int8")
    assert Bundle.open(tmp_path / "bundle").manifest.quantization.weights == "fp16"
    assert export_bundle(source, tmp_path / "bundle", weights="int8", overwrite=True).manifest.quantization.weights == "int8"
    inside = shutil.copytree(source, tmp_path / "bundle" / "source")
    with pytest.raises(ToolchainError, match="bundle would be replaced, and .*source, which is read, with it; choose"):
        export_bundle(inside, tmp_path / "bundle", weights="int8", overwrite=True)
    assert (inside / "config.json").is_file()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(ToolchainError, match="not a bundle; it is not replaced"):
        export_bundle(source, tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_over_a_link_the_bundle_that_it_points_to_is_replaced_and_the_current_directory_is_not(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint("llama").resolve()
    export_bundle(source, tmp_path / "v1", weights="fp16")
    (tmp_path / "current").symlink_to("v1")
    export_bundle(source, tmp_path / "current", weights="int8", overwrite=True)
    assert Bundle.open(tmp_path / "v1").manifest.quantization.weights == "int8"
    assert (tmp_path / "current").is_symlink() and {path.name for path in tmp_path.iterdir()} == {"v1", "current"}
    monkeypatch.chdir(tmp_path / "v1")
    with pytest.raises(ToolchainError, match=r"\. is not a name of its own"):
        export_bundle(source, Path("."), overwrite=True)
    assert Bundle.open(tmp_path / "v1").manifest.quantization.weights == "int8"


def test_a_checkpoint_that_breaks_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path / "source")
    tensors = safetensors.numpy.load_file(tmp_path / "source" / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "source" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        export_bundle(tmp_path / "source", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_an_error_and_leaves_nothing_behind(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgellm_ros.toolchain.weights.WeightWriter.write", full)
    with pytest.raises(ToolchainError, match="cannot write .*No space left.*make room .*nothing of it was kept"):
        export_bundle(tiny_checkpoint("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_cannot_be_replaced_stays_whole(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = export_bundle(tiny_checkpoint("llama"), tmp_path / "out")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ToolchainError, match="cannot write .*Input/output error"):
        export_bundle(tiny_checkpoint("llama"), tmp_path / "out", weights="int8", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Bundle.open(tmp_path / "out").manifest == first.manifest


@pytest.mark.parametrize("limit", [3_000, 120_000], ids=["before the weights", "in the weights"])
def test_bytes_that_the_disk_really_refuses_are_an_error_and_leave_nothing_behind(
    limit: int, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The kernel refuses bytes beyond a limit for files, as a full disk does."""
    source = tiny_checkpoint("llama")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(ToolchainError, match="cannot write .*File too large"):
            export_bundle(source, tmp_path / "out", weights="fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_numbers_are_said_and_not_taken_for_a_loss_of_bits(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path / "source")
    tensors = safetensors.numpy.load_file(tmp_path / "source" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    safetensors.numpy.save_file(tensors, tmp_path / "source" / "model.safetensors")
    with pytest.raises(CheckpointError, match="a weight is NaN or infinite; download the checkpoint again"):
        export_bundle(tmp_path / "source", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has a number that is NaN"):
        load_model(open_source(tmp_path / "source"), "cpu")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 0.0
    for number, what in ((np.nan, "has a number that is NaN"), (1e5, "has a number of 100000, and fp16 holds up to")):
        tensors["model.embed_tokens.weight"][290, 3] = number  # of a token that no prompt of the self-test has
        safetensors.numpy.save_file(tensors, tmp_path / "source" / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"model\.embed_tokens\.weight {what}"):
            export_bundle(tmp_path / "source", tmp_path / "out", weights="fp16")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_chat_template_that_no_runtime_compiles_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint("llama", tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").write_text("{% if %}")
    assert main(["export", str(tmp_path / "source"), "-o", str(tmp_path / "out"), "--weights", "fp16"]) == 2
    assert "the chat template is not valid Jinja: line 1: " in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_an_export_leaves_the_bundle_that_was_there(
    number: signal.Signals, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    export_bundle(tiny_checkpoint("llama"), tmp_path / "out", weights="fp16")
    before = (tmp_path / "out" / WEIGHTS).read_bytes()

    def interrupt(stage: str, done: int, total: int) -> None:
        if done == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny_checkpoint("llama"), tmp_path / "out", overwrite=True, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_weights_of_garbage_are_refused_by_the_quality_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint("llama", tmp_path / "source")

    def broken(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
        packed, scales = quantize_int4(weight, group)
        return np.ascontiguousarray(packed[::-1]), scales

    monkeypatch.setattr("edgellm_ros.toolchain.export.quantize_int4", broken)
    with pytest.raises(ToolchainError, match="logits differ from the original's by .* allowed is 0.6"):
        export_bundle(tmp_path / "source", tmp_path / "out")
    shutil.rmtree(tmp_path / "source")
    assert list(tmp_path.iterdir()) == []


def test_embedding_and_head_are_read_in_parts_from_safetensors_and_gguf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint("llama", tmp_path / "source")
    save_gguf("llama", tmp_path / "model.gguf", "Q8_0")
    monkeypatch.setattr("edgellm_ros.toolchain.export._TABLE_NUMBERS", 64 * 100)
    for source in (tmp_path / "source", tmp_path / "model.gguf"):
        whole = export_bundle(source, tmp_path / f"{source.name}-bundle").weights()
        monkeypatch.setattr("edgellm_ros.toolchain.export._TABLE_NUMBERS", 1 << 20)
        once = export_bundle(source, tmp_path / f"{source.name}-once").weights()
        monkeypatch.setattr("edgellm_ros.toolchain.export._TABLE_NUMBERS", 64 * 100)
        for name in once.names():
            np.testing.assert_array_equal(whole[name], once[name], err_msg=name)
