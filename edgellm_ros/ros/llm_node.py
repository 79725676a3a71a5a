"""The llm lifecycle node: configure loads the bundle, activate accepts work, deactivate drains, cleanup frees.

It translates between ROS and an LLM and decides nothing about generation. One executor thread runs every callback and
none of them waits: requests are prepared on a thread of their own, and streamed by another.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.task import Future
from std_msgs.msg import String

from edgellm_ros.action import Chat
from edgellm_ros.config import EngineConfig
from edgellm_ros.errors import (
    DeviceError,
    EdgeLLMError,
    InactiveError,
    RequestError,
    ShuttingDownError,
)
from edgellm_ros.llm import LLM
from edgellm_ros.msg import ModelInfo
from edgellm_ros.ros.chat_server import QOS_REQUESTS, ChatServer
from edgellm_ros.ros.convert import fill_result, model_info_to_msg, request_from_goal, set_error
from edgellm_ros.ros.diagnostics import diagnostic_array
from edgellm_ros.ros.params import NodeParameters
from edgellm_ros.ros.process import run_node
from edgellm_ros.ros.stream import Batch, Outcome, Stream, Streamer
from edgellm_ros.srv import Generate, LoadLora, ResetSession, Tokenize

OpenLLM = Callable[[str, EngineConfig], LLM]


class LLMNode(LifecycleNode):
    """Serves one bundle; `open_llm` loads it."""

    def __init__(self, open_llm: OpenLLM = LLM.open, name: str = "llm", **kwargs: Any) -> None:
        """Create the interfaces; nothing is loaded before configure. Raises ConfigError for impossible parameters."""
        super().__init__(name, **kwargs)
        self.parameters = NodeParameters(self)
        self._open_llm = open_llm
        self._llm: LLM | None = None
        self._refusal: EdgeLLMError | None = InactiveError("the node is not configured")  # None: work is accepted
        self._state = "unconfigured"
        self._last_error, self._fault = "", False
        self._intake = ThreadPoolExecutor(1, "edgellm-intake")  # one thread: requests keep their order
        self._helper = ThreadPoolExecutor(1, "edgellm-helper")
        self._streamer = Streamer(lambda: self.parameters.node.feedback_period_s)
        group = ReentrantCallbackGroup()  # a service that awaits its answer must not hold up the others
        settings = self.parameters.node
        self._chat = ChatServer(self, self._streamer, self._start, settings.result_timeout_s, group)
        for kind, name, callback in (
            (Generate, "~/generate", self._on_generate),
            (Tokenize, "~/tokenize", self._on_tokenize),
            (ResetSession, "~/reset_session", self._on_reset_session),
            (LoadLora, "~/load_lora", self._on_load_lora),
        ):
            self.create_service(kind, name, callback, qos_profile=QOS_REQUESTS, callback_group=group)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._model_info = self.create_publisher(ModelInfo, "~/model_info", latched)
        self._response = self.create_publisher(String, "~/response", 10)
        self._tokens = self.create_publisher(String, "~/tokens", 100)
        self.create_subscription(String, "~/prompt", self._on_prompt, 10, callback_group=group)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(settings.diagnostics_period_s, self._publish_diagnostics, callback_group=group)
        self.create_timer(1.0, self._chat.cancel_abandoned, callback_group=group)

    # Lifecycle

    def start(self) -> bool:
        """Configure and activate, as far as it goes; errors are logged and shown on /diagnostics."""
        success = TransitionCallbackReturn.SUCCESS
        return bool(self.trigger_configure() == success and self.trigger_activate() == success)

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the bundle."""
        bundle = self.parameters.node.bundle
        try:
            if not bundle:
                raise RequestError("the parameter bundle is empty; set it to a directory that `edgellm export` wrote")
            llm = self._open_llm(bundle, self.parameters.engine)
        except Exception as error:
            self._report(error, fault=True)
            self._refusal = InactiveError(f"the node is not configured: {error}")
            return TransitionCallbackReturn.FAILURE
        self._llm = llm
        info = llm.info
        self._publish_model_info(llm)
        self.get_logger().info(
            f"loaded {llm.bundle.manifest.model.name} from {bundle} with executor {info.name} on {info.device}: "
            f"{info.precision}, {info.num_slots} slots of {info.capacity} tokens, {info.memory_bytes / 1e6:.0f} MB"
        )
        self._enter("inactive", InactiveError("the node is inactive; activate it first"))
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Accept work."""
        self._enter("active", None)
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Refuse new work, cancel what runs, and wait for it to end."""
        self._drain(InactiveError("the node was deactivated"), "inactive")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the device."""
        self._free("unconfigured", InactiveError("the node is not configured"))
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Drain and free, from any state."""
        error = ShuttingDownError("the node is shutting down")
        self._drain(error, "finalized")
        self._free("finalized", error)
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free what there is; the node can then be configured again."""
        self._free("unconfigured", InactiveError("the node is not configured"))
        return super().on_error(state)

    def stop(self) -> None:
        """End everything before the process does; called on the executor's thread, which then sends the results."""
        if self._state != "finalized":
            self.trigger_shutdown()

    @property
    def busy(self) -> bool:
        """Whether goals wait for their results to be sent."""
        return self._chat.num_goals > 0

    def destroy_node(self) -> None:
        """Free everything."""
        self._free("finalized", ShuttingDownError("the node is shutting down"))
        self._intake.shutdown()
        self._helper.shutdown()
        self._streamer.close()
        self._chat.destroy()
        super().destroy_node()

    def _enter(self, state: str, refusal: EdgeLLMError | None) -> None:
        self._state, self._refusal = state, refusal
        if refusal is None:
            self._last_error, self._fault = "", False

    def _drain(self, reason: EdgeLLMError, state: str) -> None:
        self._enter(state, reason)
        self._streamer.cancel_all(reason)
        timeout_s = self.parameters.node.drain_timeout_s
        if not self._streamer.wait_idle(timeout_s):
            self.get_logger().warning(f"requests still run {timeout_s} s (drain_timeout_s) after they were cancelled")

    def _free(self, state: str, refusal: EdgeLLMError) -> None:
        self._enter(state, refusal)
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.close()
            self._model_info.publish(ModelInfo())

    # Requests

    def _start(self, goal: Any, stream: Stream) -> None:
        self._intake.submit(self._submit, goal, stream)

    def _submit(self, goal: Any, stream: Stream) -> None:
        """Intake's thread."""
        try:
            request = request_from_goal(goal, self.parameters.sampling, self.parameters.node.system_prompt)
            stream.attach(self._serving().submit(request, stream.notify))
        except Exception as error:
            self._report(error)
            stream.fail(error)

    def _serving(self) -> LLM:
        """The LLM; raises the reason while no work is accepted."""
        refusal, llm = self._refusal, self._llm
        if refusal is not None:
            raise refusal
        assert llm is not None
        return llm

    def _on_prompt(self, message: String) -> None:
        stream = Stream(self._streamer, self._publish_tokens, self._publish_response)
        self._start(Chat.Goal(prompt=message.data), stream)

    def _publish_tokens(self, batch: Batch) -> None:
        if batch.text:
            self._tokens.publish(String(data=batch.text))

    def _publish_response(self, outcome: Outcome) -> None:
        if outcome.error is None:
            self._response.publish(String(data=outcome.text))

    async def _on_generate(self, request: Any, response: Any) -> Any:
        ended: Future = Future()

        def end(outcome: Outcome) -> None:
            ended.set_result(outcome)
            self.executor.wake()

        self._start(request, Stream(self._streamer, None, end))
        outcome = await ended
        return fill_result(response, outcome.text, outcome.reasoning, outcome.reason, outcome.usage, outcome.error)

    async def _on_tokenize(self, request: Any, response: Any) -> Any:
        def work() -> None:
            llm = self._loaded()
            if len(request.token_ids):
                if request.text:
                    raise RequestError("text and token_ids are both given; send one of them")
                response.text = llm.detokenize([int(token) for token in request.token_ids], skip_special=False)
            else:
                response.token_ids = llm.tokenize(request.text, request.add_special)

        return await self._in_background(work, response)

    async def _on_reset_session(self, request: Any, response: Any) -> Any:
        def work() -> None:
            if not request.session_id:
                raise RequestError("session_id is empty")
            response.existed = self._loaded().reset_session(request.session_id)

        return await self._in_background(work, response)

    async def _on_load_lora(self, request: Any, response: Any) -> Any:
        def work() -> None:
            llm = self._loaded()
            if request.unload:
                llm.unload_lora(request.name)
            else:
                llm.load_lora(request.name)
            self._publish_model_info(llm)

        return await self._in_background(work, response)

    def _publish_model_info(self, llm: LLM) -> None:
        self._model_info.publish(model_info_to_msg(llm.bundle, llm.info, self.parameters.engine, llm.loras))

    def _loaded(self) -> LLM:
        llm = self._llm
        if llm is None:
            raise self._refusal or InactiveError("the node is not configured")
        return llm

    async def _in_background(self, work: Callable[[], None], response: Any) -> Any:
        """Do `work`, which fills `response`, on the helper's thread; its error goes into the response."""
        done: Future = Future()

        def run() -> None:
            try:
                work()
            except Exception as error:
                self._report(error)
                set_error(response, error)
            done.set_result(None)
            self.executor.wake()

        self._helper.submit(run)
        await done
        return response

    # Telling

    def _report(self, error: Exception, fault: bool = False) -> None:
        """Log an error and show it on /diagnostics."""
        self._last_error = f"{type(error).__name__}: {error}"
        self._fault = self._fault or fault or isinstance(error, DeviceError)
        if not isinstance(error, EdgeLLMError):
            self.get_logger().error("".join(traceback.format_exception(error)))
        elif fault:
            self.get_logger().error(self._last_error)
        else:
            self.get_logger().warning(self._last_error)

    def _publish_diagnostics(self) -> None:
        llm = self._llm
        self._diagnostics.publish(
            diagnostic_array(
                self.get_clock().now().to_msg(),
                self.get_fully_qualified_name(),
                self._state,
                self._last_error,
                self._fault,
                llm.bundle.manifest.model.name if llm else "",
                llm.info if llm else None,
                llm.metrics() if llm else None,
            )
        )


def main(args: list[str] | None = None) -> int:
    """Run the node until it is told to stop."""
    return run_node(LLMNode, args)


if __name__ == "__main__":
    raise SystemExit(main())
