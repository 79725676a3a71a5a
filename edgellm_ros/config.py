"""The settings of the runtime and of the node, each declared once as a frozen dataclass field."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_ros.errors import ToolchainError
from edgellm_ros.fields import check_settings, setting

if TYPE_CHECKING:
    from edgellm_ros.bundle import Bundle


@dataclass(frozen=True)
class EngineConfig:
    """How a bundle is loaded and run. Raises ConfigError for a value outside its range."""

    executor: str = setting(
        "auto",
        "What computes: tensorrt (a prebuilt engine), cuda (own kernels), onnxruntime (CPU), or auto for the first "
        "of these that can run here.",
        choices=("auto", "onnxruntime", "cuda", "tensorrt"),
    )
    max_slots: int = setting(
        4,
        "Sequences that decode together; on a GPU eight at a time, and more take turns.",
        minimum=1,
        maximum=64,
    )
    max_context: int = setting(
        0,
        "Tokens a slot can hold, prompt and answer together; 0 is the bundle's own limit, at most 4096.",
        minimum=0,
        maximum=2**20,
        unit="tokens",
    )
    kv_cache: str = setting(
        "auto",
        "Number format of the KV cache. auto: fp32 with onnxruntime; with cuda fp16, or bf16 for models whose numbers "
        "exceed fp16's 65504. cuda also has fp8 (E4M3), which halves its memory and reading, rounds keys and values to "
        "3 bits and cuts them off at 448; a checkpoint's scales for it are in the bundle's weights.",
        choices=("auto", "fp32", "bf16", "fp16", "fp8"),
    )
    prefill_chunk: int = setting(
        512, "Most prompt tokens computed in one step.", minimum=16, maximum=8192, unit="tokens"
    )
    prefill_chunk_busy: int = setting(
        64,
        "The same while other sequences are decoding, so that their streams do not stall.",
        minimum=16,
        maximum=8192,
        unit="tokens",
    )
    max_queue: int = setting(16, "Requests that may wait for a slot; one more is rejected.", minimum=0, maximum=4096)
    num_threads: int = setting(
        0,
        "CPU threads that compute, at most the logical CPUs of this process; 0 is one for each physical core.",
        minimum=0,
        maximum=1024,
    )
    loras: tuple[str, ...] = setting(
        (), "Adapters of the bundle (`edgellm lora pack`) to load with it, by name; requests choose among them."
    )
    max_loras: int = setting(
        0,
        "LoRA adapters that can be loaded beside the model, at least those named; 0 takes no memory.",
        minimum=0,
        maximum=64,
    )
    max_lora_rank: int = setting(
        16, "Largest rank of such an adapter, at least that of those named.", minimum=0, maximum=64
    )
    decode_batching: str = setting(
        "exact",
        "exact: an answer never depends on what else is decoding; fast: decode together even where that changes the "
        "rounding (more tokens/s in total on a CPU with int4 groups of 64 or more, or int8 groups of 128 or more).",
        choices=("exact", "fast"),
    )
    fp8_prefill: bool = setting(
        True,
        "With fp8 weights on a GPU that multiplies FP8, read prompts in FP8: nearly twice as fast, with activations "
        "rounded to E4M3 as well (about 3 % of each).",
    )
    prefix_cache: bool = setting(True, "Reuse the longest common prefix of a resident sequence.")
    pinned_tokens: int = setting(
        4096, "Host memory for pinned system prompts, in tokens of KV cache.", minimum=0, maximum=2**20, unit="tokens"
    )
    verify_files: bool = setting(True, "Check the sha256 of every file of the bundle before it is used.")
    self_test: bool = setting(True, "Compare the loaded model with the bundle's stored reference before serving.")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class NodeConfig:
    """What the ROS nodes need beyond the engine's settings. Raises ConfigError for a value outside its range."""

    bundle: str = setting("", "Directory of the bundle to serve.")
    autostart: bool = setting(True, "Configure and activate at start, without a lifecycle manager.")
    system_prompt: str = setting("", "System message for goals that bring none.", dynamic=True)
    feedback_period_s: float = setting(
        0.05,
        "Deltas are gathered for this long before they are published.",
        minimum=0.0,
        maximum=1.0,
        unit="s",
        dynamic=True,
    )
    result_timeout_s: float = setting(
        10.0, "How long a finished goal's result is kept for its client.", minimum=1.0, maximum=3600.0, unit="s"
    )
    diagnostics_period_s: float = setting(
        1.0, "Time between two messages on /diagnostics.", minimum=0.1, maximum=60.0, unit="s"
    )
    drain_timeout_s: float = setting(
        5.0, "How long deactivate waits for cancelled goals to end.", minimum=0.1, maximum=600.0, unit="s"
    )

    def __post_init__(self) -> None:
        check_settings(self)


BUILD_TARGETS = {
    "sm80": "A100", "sm86": "RTX 30, A10", "sm87": "Jetson Orin", "sm89": "RTX 40, L4", "sm110": "Jetson Thor",
    "sm120": "RTX 50", "sm121": "DGX Spark",
}  # fmt: skip
_BUILD_CONTEXT = 4096


@dataclass(frozen=True)
class BuildOptions:
    """What an engine is built for; the command line is derived from these fields."""

    max_batch: int = setting(1, "sequences that decode together", minimum=1, maximum=256)
    max_input: int = setting(1024, "tokens of one prefill step; longer prompts take several", minimum=1, unit="tokens")
    max_context: int | None = setting(
        None, f"tokens of prompt and answer: the KV cache's size (default: the bundle's, at most {_BUILD_CONTEXT})",
        minimum=2, unit="tokens",
    )  # fmt: skip
    max_verify: int = setting(8, "tokens of one decode step: 1 and the drafts that it verifies", minimum=2, maximum=64)
    profile: str = setting(
        "split", "split: one profile for decode and one for prefill; single: one for both", choices=("split", "single")
    )
    lora: bool = setting(False, "take adapters as inputs, from rank 0 to what the bundle was exported for")
    trees: bool = setting(False, "verify trees of drafts too, of up to max-verify nodes: attention's mask is an input")
    kv_cache: str = setting(
        "auto", "auto: what the engine computes in; fp8: E4M3, half the memory, with plugins only",
        choices=("auto", "fp8"),
    )  # fmt: skip
    activations: str = setting(
        "auto", "fp16, or bf16 for models whose numbers exceed fp16; auto is what the model needs",
        choices=("auto", "fp16", "bf16"),
    )  # fmt: skip
    dialect: str = setting(
        "auto", "standard: of decoder.onnx; plugin: of decoder.plugin.onnx, with this project's plugins; auto takes "
        "plugin for TensorRT before 10.15, which has no attention over a cache",
        choices=("auto", "standard", "plugin"),
    )  # fmt: skip
    memory_limit: int = setting(0, "scratch memory the engine may take; 0 is the builder's own limit", minimum=0,
                                maximum=1 << 20, unit="MiB")  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self, ToolchainError)

    def resolved(self, bundle: Bundle) -> BuildOptions:
        """With every default filled in; raises ToolchainError for a context that the bundle does not have."""
        limit = bundle.manifest.model.max_context
        context = self.max_context or min(limit, _BUILD_CONTEXT)
        if context > limit:
            raise ToolchainError(
                f"max-context {context} exceeds the bundle's {limit}; export it again with --max-context {context}"
            )
        if self.lora and not bundle.manifest.graph.max_lora_rank:
            raise ToolchainError(f"{bundle.path} has no decoder that takes adapters; export it with --max-lora-rank 16")
        if self.max_verify > context:
            raise ToolchainError(f"max-verify {self.max_verify} exceeds max-context {context}; lower it")
        prefill = max(min(self.max_input, context), self.max_verify)
        activations = needed_activations(bundle) if self.activations == "auto" else self.activations
        return dataclasses.replace(self, max_context=context, max_input=prefill, activations=activations)


def needed_activations(bundle: Bundle) -> str:
    """What an engine of `bundle` computes in where nobody asks for another: `activations` auto."""
    return "bf16" if bundle.manifest.model.wide_activations else "fp16"


# weights, activations: the algorithms that ModelOpt has for them and its checkpoint format can hold
RECIPE_METHODS: dict[tuple[str, str], tuple[str, ...]] = {
    ("fp8", "fp8"): ("max",),
    ("int4", "none"): ("awq", "gptq"),
    ("int4", "fp8"): ("awq", "gptq"),
    ("int8", "int8"): ("smoothquant",),
    ("nvfp4", "nvfp4"): ("max",),
    ("nvfp4", "none"): ("max",),
}
RECIPE_GROUPS = (128, 64, 32, 16)


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised. Raises ToolchainError for a value or a combination that does not exist."""

    weights: str = setting("int4", "Number format of the linear layers.", choices=("fp8", "int4", "int8", "nvfp4"))
    activations: str = setting(
        "none", "Number format of what the linear layers read.", choices=("none", "fp8", "int8", "nvfp4")
    )
    method: str = setting(
        "awq",
        "max: scales from the largest values; gptq: int4 rounded by what the error does to a layer's output; awq: the "
        "same after scaling the features that matter most; smoothquant: outliers go from activations to weights.",
        choices=("max", "awq", "gptq", "smoothquant"),
    )
    group_size: int = setting(
        0,
        "Input features that share an int4 scale, at most: the largest of 128, 64, 32, 16 that divides every layer.",
        minimum=0,
        maximum=128,
    )
    lm_head: str = setting(
        "none",
        "Number format of the head's weights: fp8, int4 or nvfp4; none leaves them.",
        choices=("none", "fp8", "int4", "nvfp4"),
    )
    kv_cache: str = setting(
        "none", "Number format that the KV cache is calibrated for: fp8 or none.", choices=("none", "fp8")
    )
    samples: int = setting(32, "Sequences of calibration text.", minimum=4, maximum=65536)
    sequence_length: int = setting(256, "Tokens in each of them.", minimum=16, maximum=32768, unit="tokens")
    exclude: tuple[str, ...] = setting((), "Modules that stay as they are, such as '*layers.0.*' or '*down_proj*'.")

    def __post_init__(self) -> None:
        check_settings(self, ToolchainError)
        known = RECIPE_METHODS.get((self.weights, self.activations))
        if known is None:
            table = ", ".join(f"{w} with {a}" for w, a in RECIPE_METHODS)
            raise ToolchainError(
                f"weights {self.weights} with activations {self.activations} do not exist; allowed are {table}"
            )
        if self.method not in known:
            raise ToolchainError(
                f"method is {self.method!r}; weights {self.weights} with activations {self.activations} are made "
                f"with {' or '.join(known)}"
            )
        if (self.weights == "int4") != (self.group_size != 0):
            raise ToolchainError(
                f"group_size is {self.group_size} with weights {self.weights}; it is for int4, which needs it"
            )
        if self.group_size and self.group_size not in RECIPE_GROUPS:
            raise ToolchainError(f"group_size is {self.group_size}; allowed are {', '.join(map(str, RECIPE_GROUPS))}")

    @property
    def takes_calibration(self) -> bool:
        """Whether anything depends on the calibration text; weight-only scales by the largest values do not."""
        calibrated_head = self.lm_head in ("fp8", "int4")
        needed = (self.activations != "none", self.method != "max", self.kv_cache != "none")
        return any(needed) or calibrated_head
