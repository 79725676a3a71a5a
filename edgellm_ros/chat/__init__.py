"""Chat knows meaning: messages to prompt text by the provider's template, reasoning apart from content."""

from __future__ import annotations

from edgellm_ros.chat.reasoning import ReasoningSplitter, starts_inside
from edgellm_ros.chat.template import ChatTemplate

__all__ = ["ChatTemplate", "ReasoningSplitter", "starts_inside"]
