"""A bundle's adapters from its name to the answer: LLM, `edgellm run` and `edgellm chat`, against the merged models."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import ALL, ATTENTION, merged, write_adapter
from test_export import hf_greedy
from tiny import make_model

from edgellm_ros.bundle import Bundle
from edgellm_ros.cli.main import main
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import Request, SamplingParams
from edgellm_ros.errors import BundleError, RequestError, UnsupportedError
from edgellm_ros.llm import LLM
from edgellm_ros.toolchain.lora import pack_adapter

IDS = tuple(int(i) for i in np.random.default_rng(31).integers(5, 300, 40))
CONFIG = EngineConfig(executor="onnxruntime", num_threads=1, max_context=128)


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> Path:
    """With the adapters pick (rank 8, everything) and place (rank 20, attention)."""
    root = shutil.copytree(tiny_bundle("qwen3", "fp32", 64).path, tmp_path / "bundle")
    for name, ranks, seed in (("pick", dict.fromkeys(ALL, 8), 1), ("place", dict.fromkeys(ATTENTION, 20), 2)):
        pack_adapter(write_adapter(tmp_path / name, make_model("qwen3"), ranks, seed), Bundle.open(root))
    return root


def ask(lora: str = "", max_tokens: int = 12, **fields: Any) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(prompt_ids=IDS, sampling=sampling, lora=lora, **fields)


def merged_greedy(bundle: Path, lora: str, count: int = 12) -> list[int]:
    model = make_model("qwen3")
    return hf_greedy(merged(model, bundle.parent / lora) if lora else model, np.array(IDS), count)


def test_requests_of_one_batch_are_answered_by_the_adapters_they_name(bundle: Path) -> None:
    expected = {name: merged_greedy(bundle, name) for name in ("", "pick", "place")}
    assert len(set(map(tuple, expected.values()))) == 3, "adapters that change nothing test nothing"
    with LLM.open(bundle, CONFIG, loras=["pick", "place"]) as llm:
        assert llm.loras == ("pick", "place")
        running = [(name, llm.submit(ask(name))) for name in ("pick", "", "place", "pick", "place", "")]
        for name, generation in running:
            assert list(generation.result(30).token_ids) == expected[name]


def test_adapters_share_no_keys_and_values_with_each_other(bundle: Path) -> None:
    with LLM.open(bundle, CONFIG, loras=["pick", "place"]) as llm:
        first = {name: llm.complete(ask(name)) for name in ("", "pick", "place")}
        assert [answer.usage.cached_tokens for answer in first.values()] == [0, 0, 0]
        for name in ("place", "pick", ""):
            again = llm.complete(ask(name))
            assert again.token_ids == first[name].token_ids and again.usage.cached_tokens > 0


def test_a_name_that_is_not_there_is_refused_with_those_that_are_and_a_path_is_no_name(bundle: Path) -> None:
    outside = str(bundle.parent / "place")  # a whole PEFT directory
    for name in ("grasp", outside, "../place", "lora/place", "place.safetensors"):
        with pytest.raises(RequestError, match=r"the bundle has no adapter .*; it has pick, place"):
            LLM.open(bundle, CONFIG, loras=[name])
    with LLM.open(bundle, CONFIG, loras=["pick"]) as llm:
        for name in ("grasp", outside, "../place"):
            with pytest.raises(RequestError, match=r"loaded are: pick; the bundle also has place, not loaded"):
                llm.submit(ask(name))
            with pytest.raises(RequestError, match=r"has no adapter .*; it has pick, place"):
                llm.load_lora(name)


def test_adapters_are_exchanged_while_it_serves_also_those_packed_since(bundle: Path) -> None:
    with LLM.open(bundle, EngineConfig(executor="onnxruntime", max_loras=1, max_lora_rank=32, max_context=128)) as llm:
        llm.load_lora("place")
        assert list(llm.complete(ask("place")).token_ids) == merged_greedy(bundle, "place")
        with pytest.raises(RequestError, match="'pick' has no place: max_loras is 1, loaded are place"):
            llm.load_lora("pick")
        llm.unload_lora("place")
        path = write_adapter(bundle.parent / "late", make_model("qwen3"), {"v_proj": 3, "down_proj": 5}, 3)
        pack_adapter(path, Bundle.open(bundle))
        llm.load_lora("late")
        assert llm.loras == ("late",)
        assert list(llm.complete(ask("late")).token_ids) == merged_greedy(bundle, "late")
        with pytest.raises(RequestError, match="lora is 'place'; loaded are: late"):
            llm.submit(ask("place"))


def test_an_adapter_over_the_rank_or_changed_since_it_was_packed_is_refused_and_the_engine_goes_on(
    bundle: Path, tmp_path: Path
) -> None:
    with LLM.open(bundle, EngineConfig(executor="onnxruntime", max_loras=2, max_context=128)) as llm:
        with pytest.raises(RequestError, match=r"layers\.0\.q_proj has rank 20; at most 16 .*max_lora_rank"):
            llm.load_lora("place")
        file = bundle / "lora" / "pick.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 64
        file.write_bytes(data)
        with pytest.raises(BundleError, match="pick.safetensors was changed"):
            llm.load_lora("pick")
        assert list(llm.complete(ask()).token_ids) == merged_greedy(bundle, "")


def test_an_adapter_packed_for_other_weights_is_refused(bundle: Path, tiny_bundle: Callable[..., Bundle]) -> None:
    other = shutil.copytree(tiny_bundle("qwen3", "fp16", 64).path, bundle.parent / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    mine = json.loads((bundle / "manifest.json").read_text())
    manifest["loras"] = mine["loras"]
    for name in ("lora/pick.safetensors", "lora/place.safetensors"):
        manifest["files"][name] = mine["files"][name]
    (other / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(bundle / "lora", other / "lora")
    with pytest.raises(BundleError, match="adapter 'pick' was packed for other weights; pack it again"):
        LLM.open(other, CONFIG, loras=["pick"])


def test_a_bundle_exported_without_lora_inputs_says_how_to_get_them(
    tiny_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    root = shutil.copytree(tiny_bundle("qwen3").path, tmp_path / "bundle")
    pack_adapter(write_adapter(tmp_path / "a", make_model("qwen3"), {"q_proj": 2}, 1), Bundle.open(root))
    with pytest.raises(UnsupportedError, match=r"no decoder that takes adapters; .*--max-lora-rank"):
        LLM.open(root, CONFIG, loras=["a"])


def test_a_request_file_names_adapters_and_the_command_line_the_others(bundle: Path, tmp_path: Path) -> None:
    message = {"messages": [{"role": "user", "content": "Where is the red cube?"}]}
    file = {"temperature": 0, "max_generate_length": 8, "batch_size": 4, "requests": [
        message, {**message, "lora_name": "place"}, {**message, "lora_name": "pick"}]}  # fmt: skip
    (tmp_path / "in.json").write_text(json.dumps(file))
    common = ["run", "--bundle", str(bundle), "--executor", "onnxruntime", "--input-file", str(tmp_path / "in.json")]

    def run(*options: str) -> list[list[int]]:
        assert main([*common, "--output-file", str(tmp_path / "out.json"), *options]) == 0
        return [r["output_ids"] for r in json.loads((tmp_path / "out.json").read_text())["responses"]]

    plain, place, pick = run()
    assert len({tuple(plain), tuple(place), tuple(pick)}) == 3
    assert run("--lora", "pick") == [pick, place, pick]


def test_the_commands_refuse_an_unknown_adapter_in_one_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    options = ["--executor", "onnxruntime", "--temperature", "0", "--max-tokens", "6", "--ignore-eos", "--no-stats"]
    assert main(["chat", str(bundle), *options, "--lora", "grasp"]) == 2
    assert "the bundle has no adapter 'grasp'; it has pick, place" in capsys.readouterr().err
    answers = []
    for lora in ([], ["--lora", "pick"], ["--lora", "place"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        assert main(["chat", str(bundle), *options, *lora]) == 0
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 3
