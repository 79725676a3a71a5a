"""What the tests of the CUDA executor share: the reason to skip them elsewhere, and bundles that the kernels take."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import BuildOptions, EngineConfig
from edgellm_ros.executors import Executor, create_executor, cuda
from edgellm_ros.executors.cuda import CudaExecutor

HERE = Path(__file__).parent
CONTEXT = 256


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = native.unavailable_reason()
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def _configs() -> dict[str, Callable[[], Any]]:
    import tiny
    import transformers

    common = {
        "vocab_size": 320,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    short = {**common, "num_hidden_layers": 2}  # what compute-sanitizer runs: every kernel, as seldom as can be
    wide = {**short, "hidden_size": 1024, "intermediate_size": 1536}  # rows so long that a product's tiles cut them differently
    return {
        "short_llama": lambda: transformers.LlamaConfig(**short, head_dim=64),
        "short_llama_bias": lambda: transformers.LlamaConfig(**short, head_dim=80, attention_bias=True, mlp_bias=True),
        "short_mistral": lambda: transformers.MistralConfig(**short, sliding_window=16, head_dim=96),
        "short_qwen3": lambda: transformers.Qwen3Config(**short, head_dim=128),
        "short_gemma3": lambda: transformers.Gemma3TextConfig(
            **{**short, "num_key_value_heads": 1}, head_dim=256, sliding_window=16, query_pre_attn_scalar=200,
            rope_parameters=tiny._GEMMA3, layer_types=["sliding_attention", "full_attention"],
        ),
        "gpu_llama": lambda: transformers.LlamaConfig(**common, head_dim=64),
        "gpu_llama_bias": lambda: transformers.LlamaConfig(**common, head_dim=80, attention_bias=True, mlp_bias=True),
        "gpu_mistral": lambda: transformers.MistralConfig(**common, sliding_window=16, head_dim=96),
        "gpu_qwen2": lambda: transformers.Qwen2Config(**common, tie_word_embeddings=True),
        "gpu_smollm3": lambda: transformers.SmolLM3Config(**{**common, "num_hidden_layers": 4}, no_rope_layer_interval=2),
        "gpu_phi3": lambda: transformers.Phi3Config(
            **common, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        ),
        "gpu_qwen3": lambda: transformers.Qwen3Config(**common, head_dim=128),
        "gpu_wide": lambda: transformers.Qwen3Config(**wide, head_dim=128),
        "gpu_gemma3": lambda: transformers.Gemma3TextConfig(
            **{**common, "num_key_value_heads": 1}, head_dim=256, sliding_window=16, query_pre_attn_scalar=200,
            rope_parameters=tiny._GEMMA3, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "gpu_gemma3_64": lambda: transformers.Gemma3TextConfig(
            **common, head_dim=64, sliding_window=19, layer_types=["full_attention"] + ["sliding_attention"] * 2,
            final_logit_softcapping=2.0,
        ),
    }


@pytest.fixture(scope="session")
def gpu_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """`gpu_model("gpu_qwen3")` is (the transformers model in fp32, its checkpoint's directory)."""
    import tiny
    import torch

    tiny.CONFIGS.update(_configs())
    made: dict[str, tuple[Any, Path]] = {}

    def get(kind: str) -> tuple[Any, Path]:
        if kind not in made:
            path = tmp_path_factory.mktemp(kind) / "checkpoint"
            path.mkdir()
            model = tiny.make_model(kind)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    # About 1 / sqrt(hidden_size): larger ones amplify every rounding from layer to layer.
                    parameter.mul_(1.0 if "norm" in name else 8.0 / model.config.hidden_size**0.5)
                    if "norm" in name and "gemma3" in kind:
                        parameter.sub_(1.0)  # its gains are 1 + w
            model.save_pretrained(path)
            tiny.save_tokenizer(path)
            made[kind] = model, path
        return made[kind]

    return get


@pytest.fixture(scope="session")
def gpu_bundle(
    gpu_model: Callable[[str], tuple[Any, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Bundle]:
    """`gpu_bundle("gpu_qwen3", "int4")` is that checkpoint's bundle; read-only."""
    from edgellm_ros.toolchain.export import export_bundle

    made: dict[tuple[str, str], Bundle] = {}

    def get(kind: str, weights: str = "fp16") -> Bundle:
        if (kind, weights) not in made:
            output = tmp_path_factory.mktemp(f"{kind}-{weights}") / "bundle"
            made[kind, weights] = export_bundle(gpu_model(kind)[1], output, weights=weights)
        return made[kind, weights]

    return get


@pytest.fixture
def open_cuda(gpu_bundle: Callable[..., Bundle]) -> Iterator[Callable[..., CudaExecutor]]:
    """`open_cuda(kind, weights, **settings)` is an executor, closed after the test."""
    opened: list[CudaExecutor] = []

    def get(kind: str, weights: str = "fp16", **settings: Any) -> CudaExecutor:
        opened.append(CudaExecutor(gpu_bundle(kind, weights), EngineConfig(**{"max_slots": 4, **settings})))
        return opened[-1]

    yield get
    for executor in opened:
        executor.close()


@pytest.fixture(scope="session")
def program() -> tuple[str, ...]:
    """Python's arguments that start the llm node, with the native module that this process has (test/conftest.py)."""
    check = str(HERE.parents[1] / "build" / "native-check")
    start = "from edgellm_ros.ros.llm_node import main; raise SystemExit(main())"
    return ("-c", f"import edgellm_ros; edgellm_ros.__path__.append({check!r}); {start}")


@pytest.fixture
def take_output(capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """`take_output()` is what was printed since the last call, among which the double of TensorRT's library has no complaint.

    It complains where an engine is deleted before its contexts, or a runtime before its engines.
    """

    def take() -> str:
        gc.collect()
        printed, complaints = capfd.readouterr()
        assert "nvinfer double: " not in complaints, complaints
        return printed

    return take


@pytest.fixture
def use_the_double(monkeypatch: pytest.MonkeyPatch, take_output: Callable[[], str]) -> Iterator[None]:
    """TensorRT's library is its double, and all of a test delete contexts before engines, and engines before runtimes.

    A test that reads what was printed does so by `take_output`, which looks at what it takes away for that.

    The cuda executor's norms read 16 bits, as those of an engine do, so that bits can be compared.
    """
    import double_driver

    monkeypatch.setattr(cuda, "_WIDE_NORM_INPUTS", False)
    monkeypatch.setenv("EDGELLM_NVINFER", str(double_driver.LIBRARY))
    yield
    take_output()


@pytest.fixture
def with_engine(gpu_bundle: Callable[..., Bundle], tmp_path: Path) -> Callable[..., Bundle]:
    """`with_engine(kind, weights, **plan)` is a bundle of the test's own with an engine of the double for this GPU."""

    def get(kind: str = "gpu_qwen3", weights: str = "fp16", bundle: Bundle | None = None, **plan: Any) -> Bundle:
        from double_plan import write_double_engine
        from double_steps import BUILD

        source = bundle or gpu_bundle(kind, weights)
        path = tmp_path / f"{kind}-{weights}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(source.path, path)
        copied = Bundle.open(path)
        major, minor = native.load().device_info()["compute_capability"]
        options = BuildOptions(**{**BUILD, **plan.pop("build", {})})
        write_double_engine(copied, options, f"sm{major}{minor}", **plan)
        return copied

    return get


@pytest.fixture
def open_one(with_engine: Callable[..., Bundle]) -> Iterator[Callable[..., Executor]]:
    """`open_one(name, bundle, **settings)` is an executor, closed after the test."""
    opened: list[Executor] = []

    def get(name: str, bundle: Bundle, **settings: Any) -> Executor:
        from double_steps import config

        opened.append(create_executor(bundle, config(name, **settings)))
        assert opened[-1].info.name == name
        return opened[-1]

    yield get
    for executor in opened:
        executor.close()
