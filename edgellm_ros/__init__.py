"""edgellm_ros: run a language model on a robot, and talk to it over ROS 2.

The generated interfaces (edgellm_ros.msg, .srv, .action) and this code share one package name; extend_path joins
them when Python starts inside the repository, where the source tree would shadow the installed half.
"""

from __future__ import annotations

import importlib
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

__path__ = extend_path(__path__, __name__)
__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgellm_ros.bundle import Bundle
    from edgellm_ros.config import EngineConfig
    from edgellm_ros.core import ChatMessage, Delta, FinishReason, Request, SamplingParams, Tool, Usage
    from edgellm_ros.errors import EdgeLLMError
    from edgellm_ros.llm import LLM

_HOME = {
    "LLM": "llm",
    "Bundle": "bundle",
    "EngineConfig": "config",
    "ChatMessage": "core",
    "Delta": "core",
    "FinishReason": "core",
    "Request": "core",
    "SamplingParams": "core",
    "Tool": "core",
    "Usage": "core",
    "EdgeLLMError": "errors",
}

__all__ = ["LLM", "Bundle", "ChatMessage", "Delta", "EdgeLLMError", "EngineConfig", "FinishReason", "Request"]
__all__ += ["SamplingParams", "Tool", "Usage"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
