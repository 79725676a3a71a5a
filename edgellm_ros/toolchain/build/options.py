"""What an engine is built for. Importing this costs nothing: the command line is derived from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm_ros.errors import ToolchainError
from edgellm_ros.fields import check_settings, setting

if TYPE_CHECKING:
    from edgellm_ros.bundle import Bundle

TARGETS = {
    "sm80": "A100", "sm86": "RTX 30, A10", "sm87": "Jetson Orin", "sm89": "RTX 40, L4", "sm110": "Jetson Thor",
    "sm120": "RTX 50", "sm121": "DGX Spark",
}  # fmt: skip
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class BuildOptions:
    """What an engine is built for; the command line is derived from these fields."""

    max_batch: int = setting(1, "sequences that decode together", minimum=1, maximum=256)
    max_input: int = setting(1024, "tokens of one prefill step; longer prompts take several", minimum=1, unit="tokens")
    max_context: int | None = setting(
        None, f"tokens of prompt and answer: the KV cache's size (default: the bundle's, at most {DEFAULT_CONTEXT})",
        minimum=2, unit="tokens",
    )  # fmt: skip
    max_verify: int = setting(8, "tokens of one decode step: 1 and the drafts that it verifies", minimum=2, maximum=64)
    profile: str = setting(
        "split", "split: one profile for decode and one for prefill; single: one for both", choices=("split", "single")
    )
    memory_limit: int = setting(0, "scratch memory the engine may take; 0 is the builder's own limit", minimum=0,
                                unit="MiB")  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self, ToolchainError)

    def resolved(self, bundle: Bundle) -> BuildOptions:
        """With every default filled in; raises ToolchainError for a context that the bundle does not have."""
        limit = bundle.manifest.model.max_context
        context = self.max_context or min(limit, DEFAULT_CONTEXT)
        if context > limit:
            raise ToolchainError(
                f"max-context {context} exceeds the bundle's {limit}; export it again with --max-context {context}"
            )
        if self.max_verify > context:
            raise ToolchainError(f"max-verify {self.max_verify} exceeds max-context {context}; lower it")
        prefill = max(min(self.max_input, context), self.max_verify)
        return dataclasses.replace(self, max_context=context, max_input=prefill)
