"""The words that every layer speaks: Request in, Delta out, and what they are made of."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass

from edgellm_ros.errors import RequestError
from edgellm_ros.fields import check_settings, setting

ROLES = ("system", "user", "assistant", "tool")


class FinishReason(str, enum.Enum):
    """Why a sequence ended. CANCELLED and DEADLINE are partial answers, not errors."""

    STOP = "stop"  # a stop id or a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"  # Delta.error says which


class Phase(enum.IntEnum):
    """Where a request stands; the values are those of the Chat action's feedback."""

    QUEUED = 0
    PREFILL = 1
    DECODE = 2
    DONE = 3


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant made: `arguments` is a JSON object as text."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Tool:
    """A function that the assistant may call: `parameters` is a JSON schema as text."""

    name: str
    description: str = ""
    parameters: str = '{"type": "object", "properties": {}}'


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation; `images` holds encoded bytes (JPEG, PNG), never paths or URLs."""

    role: str
    content: str = ""
    reasoning: str = ""
    images: tuple[bytes, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise RequestError(f"role is {self.role!r}; allowed are {', '.join(ROLES)}")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. The defaults suit a chat with a small model: likely tokens, but not always the same.

    The order is: logit bias, penalties, temperature, top-k, top-p, min-p (as Hugging Face's processors and warpers).
    A temperature of 0 is greedy. Raises RequestError for a value outside its range.
    """

    temperature: float = setting(0.7, "Softmax temperature; 0 is greedy.", minimum=0.0, maximum=100.0, dynamic=True)
    top_k: int = setting(0, "Keep the k most likely tokens; 0 keeps all.", minimum=0, maximum=2**31 - 1, dynamic=True)
    top_p: float = setting(
        1.0, "Keep the smallest set of tokens whose probability reaches p.", minimum=0.0, maximum=1.0, dynamic=True
    )
    min_p: float = setting(
        0.05,
        "Keep tokens at least this share as likely as the most likely one.",
        minimum=0.0,
        maximum=1.0,
        dynamic=True,
    )
    repetition_penalty: float = setting(
        1.0,
        "Divide (or multiply, if negative) the logits of tokens seen in prompt and answer by this.",
        minimum=0.01,
        maximum=100.0,
        dynamic=True,
    )
    presence_penalty: float = setting(
        0.0, "Subtract this from the logits of tokens in the answer.", minimum=-100.0, maximum=100.0, dynamic=True
    )
    frequency_penalty: float = setting(
        0.0, "Subtract this for each time a token is in the answer.", minimum=-100.0, maximum=100.0, dynamic=True
    )
    max_tokens: int = setting(
        256, "Most tokens to generate.", minimum=1, maximum=2**31 - 1, unit="tokens", dynamic=True
    )
    seed: int | None = setting(
        None,
        "Seed of the draw; the same request and seed give the same tokens. None draws a fresh one.",
        minimum=0,
        maximum=2**63 - 1,
        dynamic=True,
    )
    stop: tuple[str, ...] = setting((), "Texts that end the answer; they are not part of it.", dynamic=True)
    ignore_eos: bool = setting(False, "Go on after the model's own end token (for benchmarks).", dynamic=True)
    logprobs: int | None = None  # None: none; n: the drawn token's and the n most likely ones' log-probabilities
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)  # token id -> added to its logit

    def __post_init__(self) -> None:
        check_settings(self, RequestError)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop has {text!r}; each stop text must be a non-empty string")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise RequestError(f"logprobs is {self.logprobs}; allowed is 0 to 20, or None")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or token < 0 or not -1000.0 <= float(bias) <= 1000.0:
                raise RequestError(f"logit_bias has {token!r}: {bias!r}; token ids are >= 0, biases -1000 to 1000")

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0.0 or self.top_k == 1


@dataclass(frozen=True)
class Request:
    """One generation. Exactly one of `messages`, `prompt` (raw text) and `prompt_ids` (token ids) is given.

    priority: 0 to 255, higher is served first; deadline_s: seconds from submission, after which the answer so far is
    returned with FinishReason.DEADLINE. enable_thinking None leaves the choice to the chat template.
    Raises RequestError when the fields contradict each other.
    """

    messages: tuple[ChatMessage, ...] = ()
    prompt: str = ""
    prompt_ids: tuple[int, ...] = ()
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    tools: tuple[Tool, ...] = ()
    enable_thinking: bool | None = None
    add_generation_prompt: bool = True
    priority: int = 0
    deadline_s: float | None = None
    session_id: str = ""  # keeps this conversation's KV cache resident in preference to others'
    lora: str = ""  # name of a loaded LoRA adapter; empty: the model as it is
    pin_system_prompt: bool = False  # keep the system prompt's KV cache past eviction

    def __post_init__(self) -> None:
        given = [n for n in ("messages", "prompt", "prompt_ids") if getattr(self, n)]
        if len(given) != 1:
            what = " and ".join(given) or "none of them"
            raise RequestError(f"a request needs exactly one of messages, prompt and prompt_ids; given: {what}")
        if not 0 <= self.priority <= 255:
            raise RequestError(f"priority is {self.priority}; allowed is 0 to 255")
        if self.deadline_s is not None and not 0.0 < self.deadline_s < 1e9:
            raise RequestError(f"deadline_s is {self.deadline_s}; it must be above 0, or None for no deadline")


@dataclass(frozen=True)
class TokenLogprob:
    """A drawn token's log-probability before temperature and truncation, and those of the most likely tokens."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), most likely first


@dataclass(frozen=True)
class Usage:
    """What one request took: tokens, and seconds from its submission."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, taken from a resident KV cache
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    queue_s: float = 0.0
    time_to_first_token_s: float = 0.0  # from submission
    prefill_s: float = 0.0  # from admission to the first token
    decode_s: float = 0.0  # from the first token to the last
    total_s: float = 0.0


@dataclass(frozen=True)
class Delta:
    """One step of an answer. Concatenating `text` (and `reasoning`) over all deltas gives the whole answer.

    The last delta has phase DONE, `finish_reason` and `usage`; with FinishReason.ERROR, `error` is the exception.
    """

    phase: Phase
    text: str = ""
    reasoning: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    queue_position: int = 0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer: what the deltas of one request add up to."""

    text: str
    finish_reason: FinishReason
    reasoning: str = ""
    token_ids: tuple[int, ...] = ()  # as generated, a stop id that ended the answer included
    logprobs: tuple[TokenLogprob, ...] = ()
    usage: Usage = dataclasses.field(default_factory=Usage)
