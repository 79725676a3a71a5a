"""The node's adapters: loaded at start and by the service, named in goals, and never a path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from adapters import ALL, ATTENTION, write_adapter
from edgellm_ros.msg import ErrorCode, ModelInfo
from edgellm_ros.srv import LoadLora
from node_process import NodeProcess, Probe
from tiny import make_model

from edgellm_ros import errors
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import ChatMessage, Request, SamplingParams
from edgellm_ros.llm import LLM
from edgellm_ros.ros.client import LLMClient
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.lora import pack_adapter

PROMPT = "Where is the red cube?"


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, tmp_path_factory) -> Bundle:
    """A tiny model with the adapters pick and place."""
    root = tmp_path_factory.mktemp("lora")
    made = export_bundle(tiny_checkpoint("qwen3"), root / "bundle", weights="fp16", max_lora_rank=16)
    for name, targets, seed in (("pick", ALL, 1), ("place", ATTENTION, 2)):
        path = write_adapter(root / name, make_model("qwen3"), dict.fromkeys(targets, 8), seed)
        _, made = pack_adapter(path, made)
    return made


@pytest.fixture(scope="module")
def expected(bundle, executor) -> dict[str, str]:
    """The texts that the library gives in this process."""
    config = EngineConfig(executor=executor, max_context=128)
    sampling = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    with LLM.open(bundle, config, loras=["pick", "place"]) as llm:
        return {
            name: llm.complete(Request(messages=(ChatMessage("user", PROMPT),), sampling=sampling, lora=name)).text
            for name in ("", "pick", "place")
        }


@pytest.fixture(scope="module")
def node(bundle, executor, program) -> Iterator[NodeProcess]:
    parameters = {"engine.executor": executor, "engine.max_context": 128, "engine.loras": "[pick]",
                  "engine.max_loras": 2}  # fmt: skip
    with NodeProcess(bundle.path, parameters, program=program) as process:
        yield process


def test_goals_name_adapters_that_were_loaded_at_start_or_by_the_service(node, bundle, expected):
    assert len(set(expected.values())) == 3

    def say(lora: str) -> str:
        return client.generate(PROMPT, lora=lora, temperature=0.0, max_tokens=16, ignore_eos=True, timeout_s=20).text

    with Probe() as probe, LLMClient("llm") as client:
        infos = probe.listen(ModelInfo, "llm/model_info", latched=True)
        probe.wait_for(lambda: bool(infos), 10)
        assert list(infos[-1].adapters) == ["pick"]
        assert [say(""), say("pick")] == [expected[""], expected["pick"]]
        with pytest.raises(errors.RequestError, match="lora is 'place'; loaded are: pick; the bundle also has place"):
            say("place")
        loaded = probe.call(LoadLora, "load_lora", LoadLora.Request(name="place"))
        assert loaded.error_code == ErrorCode.NONE, loaded.error_msg
        probe.wait_for(lambda: list(infos[-1].adapters) == ["pick", "place"], 10)
        assert [say("place"), say(""), say("pick")] == [expected["place"], expected[""], expected["pick"]]
        freed = probe.call(LoadLora, "load_lora", LoadLora.Request(name="pick", unload=True))
        assert freed.error_code == ErrorCode.NONE, freed.error_msg
        probe.wait_for(lambda: list(infos[-1].adapters) == ["place"], 10)
        with pytest.raises(errors.RequestError, match="lora is 'pick'; loaded are: place"):
            say("pick")
        client.load_lora("pick")
        assert [say("pick"), say("place")] == [expected["pick"], expected["place"]]
        client.unload_lora("pick")
        with pytest.raises(errors.RequestError, match="lora is 'pick'; loaded are: place"):
            client.unload_lora("pick")
        for name in ("grasp", str(bundle.path.parent / "pick"), "../pick", ""):
            refused = probe.call(LoadLora, "load_lora", LoadLora.Request(name=name))
            assert refused.error_code == ErrorCode.REQUEST_INVALID
            assert "it has pick, place" in refused.error_msg
        assert say("place") == expected["place"]
