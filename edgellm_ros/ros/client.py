"""A client for planners and scripts: `for delta in llm.chat("hello"): ...`, with cancel, results and errors in Python.

It has a node and a thread of its own, so it works alone and inside the callbacks of any other node. Everything is sent
on that thread: rclpy loses a response that arrives before the sender has noted what it is waiting for.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import rclpy
from rclpy.action import ActionClient
from rclpy.context import Context
from rclpy.executors import Executor, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile

from edgellm_ros import errors
from edgellm_ros.action import Chat
from edgellm_ros.errors import EdgeLLMError, UnavailableError
from edgellm_ros.ros.goal import make_goal, make_message
from edgellm_ros.srv import LoadLora, ResetSession, Tokenize

_LOST_AFTER_S = 3.0
_QOS = QoSProfile(depth=100)  # the default keeps 10 responses
_SHUT_DOWN = "ROS was shut down in this process"
_counter = itertools.count()


@dataclass(frozen=True)
class ChatResult:
    """A whole answer. finish_reason is stop, length, cancelled or deadline; usage is the message Usage."""

    text: str
    reasoning: str
    finish_reason: str
    usage: Any


@contextlib.contextmanager
def _until_shutdown(context: Context) -> Iterator[None]:
    """Leave the block quietly where the context is shut down in it, for which rclpy has exceptions of several kinds."""
    try:
        yield
    except Exception:
        if context.ok():
            raise


def _guard(function: Callable[..., Any], failed: Callable[[Exception], None]) -> Callable[..., None]:
    """`function` for an executor's thread: what it raises goes to `failed`, for it would end the thread."""

    def run(*args: Any) -> None:
        try:
            function(*args)
        except Exception as error:
            failed(error)

    return run


class _Sender:
    """Runs functions on an executor's thread in the order in which they were given; create_task alone reverses it."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._functions: deque[Callable[[], Any]] = deque()

    def send(self, function: Callable[[], Any]) -> None:
        self._functions.append(function)
        self._executor.create_task(lambda: self._functions.popleft()())


class ChatStream:
    """One running goal: iterate over the answer's text as it comes, `cancel` it, or wait for its `result`.

    Used in a `with`, it is cancelled when the block is left early. Text that feedback lost is made up for at the end,
    from the result. Raises the error that the node ended the goal with, as the exception of edgellm_ros.errors.
    """

    def __init__(self, client: ActionClient, sender: _Sender, context: Context, goal: Any) -> None:
        """Send the goal."""
        self._client, self._sender, self._context = client, sender, context
        self._items: queue.SimpleQueue[str] = queue.SimpleQueue()  # an empty text only wakes the reader
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._handle: Any = None
        self._cancel = False
        self._num_received = 0  # characters
        self._result: ChatResult | None = None
        self._error: Exception | None = None
        self.sent_at = time.monotonic()
        self.first_delta_s: float | None = None  # from sending the goal to its first text
        self.state = Chat.Feedback.STATE_QUEUED
        sender.send(_guard(lambda: self._send(goal), self._fail))

    def __iter__(self) -> Iterator[str]:
        while not (self._done.is_set() and self._items.empty()):  # at once where another has read to the end
            try:
                text = self._items.get(timeout=1.0)
            except queue.Empty:
                self._check_node()
                continue
            if text:
                yield text
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Ask the node to stop; the result is what was generated so far, with finish_reason cancelled."""
        with self._lock:
            self._cancel = True
            handle = self._handle
        if handle is not None and not self._done.is_set():
            self._sender.send(_guard(handle.cancel_goal_async, self._fail))

    def result(self, timeout_s: float | None = None) -> ChatResult:
        """Wait for the end; raises the goal's error, and TimeoutError (the goal goes on) after `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._done.wait(1.0 if deadline is None else max(0.0, min(1.0, deadline - time.monotonic()))):
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"no result within {timeout_s} s")
            self._check_node()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return self._done.is_set()

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def _send(self, goal: Any) -> None:
        accepted = self._client.send_goal_async(goal, _guard(self._on_feedback, self._fail))
        accepted.add_done_callback(_guard(self._on_accepted, self._fail))

    def _on_feedback(self, message: Any) -> None:
        feedback = message.feedback
        self.state = feedback.state
        if feedback.delta and feedback.offset == self._num_received:
            self._put(feedback.delta)

    def _put(self, text: str) -> None:
        if self.first_delta_s is None:
            self.first_delta_s = time.monotonic() - self.sent_at
        self._num_received += len(text)
        self._items.put(text)

    def _on_accepted(self, future: Any) -> None:
        handle = future.result()
        if handle is None or not handle.accepted:
            self._end(error=UnavailableError("the node rejected the goal"))
            return
        with self._lock:
            self._handle = handle
            cancel = self._cancel
        handle.get_result_async().add_done_callback(_guard(self._on_result, self._fail))
        if cancel:
            handle.cancel_goal_async()

    def _on_result(self, future: Any) -> None:
        response = future.result()
        result = None if response is None else response.result
        if result is None or not (result.finish_reason or result.error_code):
            self._end(error=UnavailableError("the node has no result of this goal"))
        elif result.error_code:
            self._end(error=error_from_code(result.error_code, result.error_msg))
        else:
            text = result.message.content
            if len(text) > self._num_received:
                self._put(text[self._num_received :])
            self._end(ChatResult(text, result.message.reasoning, result.finish_reason, result.usage))

    def _end(self, result: ChatResult | None = None, error: Exception | None = None) -> None:
        with self._lock:
            if self._done.is_set():
                return
            self._result, self._error = result, error
            self._done.set()
        self._items.put("")

    def _fail(self, error: Exception) -> None:
        self._end(error=error if self._context.ok() else UnavailableError(_SHUT_DOWN))

    def _check_node(self) -> None:
        """End the goal when its node has been gone for a while, or ROS in this process: a signal shuts it down."""
        with _until_shutdown(self._context):
            if self._done.is_set() or (self._context.ok() and self._client.wait_for_server(_LOST_AFTER_S)):
                return
        self._end(error=UnavailableError("the node is gone" if self._context.ok() else _SHUT_DOWN))


class LLMClient:
    """Talks to one llm node. All methods are thread-safe.

    Close it, or use it in a `with`; otherwise it is closed when Python ends.
    """

    def __init__(self, node_name: str = "llm", *, node: Node | None = None, timeout_s: float = 30.0) -> None:
        """Connect to the node `node_name`, with namespace if it has one; waits for it up to `timeout_s`.

        `node` is the caller's own node, if any: the client then shares its context and namespace. Raises
        UnavailableError when no such node appears.
        """
        self._owns_context = node is None and not rclpy.ok()
        if self._owns_context:
            rclpy.init()
        context = node.context if node is not None else rclpy.get_default_context()
        namespace = node.get_namespace() if node is not None else ""
        name = f"llm_client_{time.time_ns() % 10**9}_{next(_counter)}"
        self._node = rclpy.create_node(name, context=context, namespace=namespace, use_global_arguments=False)
        deep = {f"{kind}_service_qos_profile": _QOS for kind in ("goal", "result", "cancel")}
        self._chat = ActionClient(self._node, Chat, f"{node_name}/chat", **deep, feedback_sub_qos_profile=_QOS)
        self._tokenize = self._node.create_client(Tokenize, f"{node_name}/tokenize")
        self._reset = self._node.create_client(ResetSession, f"{node_name}/reset_session")
        self._lora = self._node.create_client(LoadLora, f"{node_name}/load_lora")
        self._context = context
        self._executor = SingleThreadedExecutor(context=context)
        self._executor.add_node(self._node)
        self._sender = _Sender(self._executor)
        self._thread = threading.Thread(target=self._spin, name="llm-client", daemon=True)
        self._thread.start()
        self._streams: list[ChatStream] = []
        # Python ends threads that still run inside ROS in a way that aborts the process.
        atexit.register(self.close)
        if not self._chat.wait_for_server(timeout_s):
            self.close()
            raise UnavailableError(f"no node {node_name!r} with an action chat appeared within {timeout_s} s")

    def chat(self, prompt: str | Sequence[Any] = "", **options: Any) -> ChatStream:
        """Send a goal and return its stream.

        `prompt` is the user's text, or the conversation as ChatMessage messages or (role, content) pairs. `options` are
        fields of the goal (session_id, priority, tools, raw_prompt, thinking, ...; deadline in seconds) and of Sampling
        (max_tokens, temperature, seed, stop, ...). Raises RequestError for an option that does not exist, for a value
        of another type, and for one that would not arrive as it is: a number beyond its field's type, a text with a NUL
        or a lone surrogate.
        """
        stream = ChatStream(self._chat, self._sender, self._context, make_goal(prompt, **options))
        self._streams = [s for s in self._streams if not s.done] + [stream]
        return stream

    def generate(self, prompt: str | Sequence[Any] = "", timeout_s: float | None = None, **options: Any) -> ChatResult:
        """The whole answer; takes what `chat` does. A goal that exceeds `timeout_s` is cancelled."""
        with self.chat(prompt, **options) as stream:
            return stream.result(timeout_s)

    def cancel(self) -> None:
        """Cancel every goal that this client has running."""
        for stream in list(self._streams):
            if not stream.done:
                stream.cancel()

    def tokenize(self, text: str, add_special: bool = False, timeout_s: float = 10.0) -> list[int]:
        """Token ids of a text."""
        request = make_message(Tokenize.Request, text=text, add_special=add_special)
        response = self._call(self._tokenize, request, timeout_s)
        return [int(token) for token in response.token_ids]

    def reset_session(self, session_id: str, timeout_s: float = 10.0) -> bool:
        """Forget what is resident of a conversation; False when there was nothing."""
        request = make_message(ResetSession.Request, session_id=session_id)
        return bool(self._call(self._reset, request, timeout_s).existed)

    def load_lora(self, name: str, timeout_s: float = 60.0) -> None:
        """Have an adapter of the node's bundle loaded, so that goals can name it (`lora`)."""
        self._call(self._lora, make_message(LoadLora.Request, name=name), timeout_s)

    def unload_lora(self, name: str, timeout_s: float = 10.0) -> None:
        """Free an adapter's place; goals that use it must have ended."""
        self._call(self._lora, make_message(LoadLora.Request, name=name, unload=True), timeout_s)

    def close(self) -> None:
        """Cancel what runs and disconnect."""
        atexit.unregister(self.close)
        self.cancel()
        deadline = time.monotonic() + 1.0
        while any(not stream.done for stream in self._streams) and time.monotonic() < deadline:
            time.sleep(0.005)
        self._executor.shutdown()
        self._thread.join(timeout=5.0)
        with _until_shutdown(self._context):
            self._chat.destroy()
            self._node.destroy_node()
        if self._owns_context:
            rclpy.try_shutdown()

    def __enter__(self) -> LLMClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _spin(self) -> None:
        with _until_shutdown(self._context):
            self._executor.spin()

    def _call(self, client: Any, request: Any, timeout_s: float) -> Any:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()  # of one response, or the exception in its place

        def send() -> None:
            answered = _guard(lambda future: answers.put(future.result()), answers.put)
            client.call_async(request).add_done_callback(answered)

        with _until_shutdown(self._context):
            if not client.wait_for_service(timeout_s) and self._context.ok():
                raise UnavailableError(f"no service {client.srv_name} appeared within {timeout_s} s")
            self._sender.send(_guard(send, answers.put))
        deadline = time.monotonic() + timeout_s
        response = None
        while response is None:
            if not self._context.ok():
                raise UnavailableError(_SHUT_DOWN)
            with contextlib.suppress(queue.Empty):
                response = answers.get(timeout=max(0.0, min(1.0, deadline - time.monotonic())))
            if response is None and time.monotonic() >= deadline:
                raise TimeoutError(f"no response from {client.srv_name} within {timeout_s} s")
        if isinstance(response, Exception):
            raise response if self._context.ok() else UnavailableError(_SHUT_DOWN)
        if response.error_code:
            raise error_from_code(response.error_code, response.error_msg)
        return response


def error_from_code(code: int, message: str) -> EdgeLLMError:
    """The exception that an error_code stands for."""
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, EdgeLLMError)]
    kind = next((c for c in classes if c.code == code), EdgeLLMError)
    return kind(message)
