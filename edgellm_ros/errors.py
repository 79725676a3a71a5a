"""Every exception that this package raises on purpose, and the error code a ROS result carries for it.

    EdgeLLMError                      9  INTERNAL
    ├── RequestError                100  REQUEST_INVALID        the caller's mistake; nothing was computed
    │   ├── ContextOverflowError    101  CONTEXT_OVERFLOW       prompt (+ max_tokens) does not fit the context
    │   ├── TemplateError           102  TEMPLATE_FAILED        the chat template refused the messages
    │   └── UnsupportedError        103  UNSUPPORTED            this bundle or executor cannot honour the field
    ├── UnavailableError            200  UNAVAILABLE            not accepting work now; try again
    │   ├── QueueFullError          201  QUEUE_FULL
    │   ├── InactiveError           202  INACTIVE               the lifecycle node is not active
    │   └── ShuttingDownError       203  SHUTTING_DOWN
    ├── BundleError                 300  BUNDLE_INVALID         a bundle's file is missing, changed or truncated
    ├── ConfigError                 301  CONFIG_INVALID         a setting has an impossible value
    ├── DeviceError                 400  DEVICE_FAILED          the executor failed and can no longer be used
    └── ToolchainError              500  TOOLCHAIN_FAILED       an offline step failed
        ├── CheckpointError         501  CHECKPOINT_INVALID
        └── UnknownModelError       502  MODEL_UNKNOWN          a family that export does not know

100 to 199 are the caller's, 200 to 299 the node's state, 300 to 399 the installation's, 400 to 499 the device's,
500 to 599 the toolchain's; 0 is success. A message says the value, what is allowed, and the remedy.
"""

from __future__ import annotations

from typing import ClassVar


class EdgeLLMError(Exception):
    """Base of everything that this package raises on purpose."""

    code: ClassVar[int] = 9


class RequestError(EdgeLLMError):
    """A request has a field that is missing, contradictory or out of range."""

    code = 100


class ContextOverflowError(RequestError):
    """The prompt does not fit the context; raised before any work is done."""

    code = 101


class TemplateError(RequestError):
    """The model's chat template could not render the messages."""

    code = 102


class UnsupportedError(RequestError):
    """A field asks for something that this bundle, executor or version cannot do."""

    code = 103


class UnavailableError(EdgeLLMError):
    """No work is accepted at this moment; the same request may be accepted later."""

    code = 200


class QueueFullError(UnavailableError):
    """Every slot is busy and the waiting queue is full."""

    code = 201


class InactiveError(UnavailableError):
    """The lifecycle node is not in its active state."""

    code = 202


class ShuttingDownError(UnavailableError):
    """The engine is being closed."""

    code = 203


class BundleError(EdgeLLMError):
    """A bundle's file is missing, changed, truncated, or made for another version."""

    code = 300


class ConfigError(EdgeLLMError):
    """A setting has an unknown name or an impossible value."""

    code = 301


class DeviceError(EdgeLLMError):
    """The executor failed while computing; it cannot be used any more."""

    code = 400


class ToolchainError(EdgeLLMError):
    """An offline step (export, quantise, build, verify) failed."""

    code = 500


class CheckpointError(ToolchainError):
    """A checkpoint has missing, extra or wrongly shaped tensors, or unreadable files."""

    code = 501


class UnknownModelError(ToolchainError):
    """No model family in toolchain/families/ fits the checkpoint."""

    code = 502
