"""The settings of the runtime and of the node, each declared once as a frozen dataclass field."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_ros.fields import check_settings, setting


@dataclass(frozen=True)
class EngineConfig:
    """How a bundle is loaded and run. Raises ConfigError for a value outside its range."""

    executor: str = setting(
        "auto",
        "What computes: tensorrt (a prebuilt engine), cuda (own kernels), onnxruntime (CPU), or auto for the first "
        "of these that can run here.",
        choices=("auto", "onnxruntime", "cuda", "tensorrt"),
    )
    max_slots: int = setting(4, "Sequences that decode together.", minimum=1, maximum=64)
    max_context: int = setting(
        0,
        "Tokens a slot can hold, prompt and answer together; 0 is the bundle's own limit, at most 4096.",
        minimum=0,
        maximum=2**20,
        unit="tokens",
    )
    kv_cache: str = setting(
        "auto",
        "Number format of the KV cache. auto: what the executor computes in (cuda: bf16, onnxruntime: fp32). cuda also "
        "has fp16 and fp8; fp8 (E4M3 without scales) halves its memory and reading, rounds keys and values to 3 bits "
        "and cuts them off at 448.",
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
    num_threads: int = setting(0, "CPU threads that compute; 0 is one for each physical core.", minimum=0, maximum=1024)
    max_loras: int = setting(
        0,
        "LoRA adapters that can be loaded beside the model (cuda executor); 0 takes no memory.",
        minimum=0,
        maximum=64,
    )
    max_lora_rank: int = setting(16, "Largest rank of such an adapter.", minimum=0, maximum=64)
    decode_batching: str = setting(
        "exact",
        "exact: an answer never depends on what else is decoding; fast: decode together even where that changes the "
        "rounding (more tokens/s in total on a CPU with int4 groups of 64 or more).",
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
