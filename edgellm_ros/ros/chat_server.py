"""The action ~/chat: every goal is accepted, streamed as feedback, and ended with a result that says why.

A ROS rejection cannot carry a reason, so a goal that cannot be served is accepted and aborted at once with error_code
and error_msg. All calls into rclpy's action server, feedback apart, are made on the executor's thread, so a cancel can
never meet a goal that is being finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.task import Future

from edgellm_ros.action import Chat
from edgellm_ros.core import FinishReason, Phase
from edgellm_ros.errors import EdgeLLMError
from edgellm_ros.ros.convert import fill_result
from edgellm_ros.ros.stream import Batch, Outcome, Stream, Streamer

ABANDONED_AFTER_S = 2.0
QOS_REQUESTS = QoSProfile(depth=100)  # with the default of 10, the 11th goal sent at once is lost without an answer


class AbandonedError(EdgeLLMError):
    """Nobody listens to a goal's feedback any more."""


@dataclass
class _Goal:
    handle: ServerGoalHandle
    stream: Stream | None = None
    ended: Future = field(default_factory=Future)
    begun: bool = False  # the handle's execute() is scheduled
    seq: int = 0
    offset: int = 0
    reasoning_offset: int = 0
    listeners: frozenset[bytes] = frozenset()  # who listened to feedback when the goal was young
    alone_since: float | None = None


class ChatServer:
    """Serves the Chat action of a node; `start` hands a goal's message and its stream on, without waiting."""

    def __init__(
        self,
        node: Node,
        streamer: Streamer,
        start: Callable[[Any, Stream], None],
        result_timeout_s: float,
        group: CallbackGroup,
    ) -> None:
        """Create the action server."""
        self._node, self._streamer, self._start = node, streamer, start
        self._goals: dict[bytes, _Goal] = {}
        self._server = ActionServer(
            node,
            Chat,
            "~/chat",
            execute_callback=self._execute,
            goal_callback=lambda _: GoalResponse.ACCEPT,
            handle_accepted_callback=self._accepted,
            cancel_callback=self._cancel,
            callback_group=group,
            goal_service_qos_profile=QOS_REQUESTS,
            result_service_qos_profile=QOS_REQUESTS,
            cancel_service_qos_profile=QOS_REQUESTS,
            feedback_pub_qos_profile=QoSProfile(depth=100),
            result_timeout=round(result_timeout_s),
        )
        self._feedback_topic = node.resolve_topic_name("~/chat/_action/feedback")

    @property
    def num_goals(self) -> int:
        """Goals whose results are not sent yet."""
        return len(self._goals)

    def cancel_abandoned(self) -> None:
        """Cancel goals of clients that went away; called now and then on the executor's thread.

        rclpy does not tell which client sent a goal, so a goal is abandoned when none of those that listened to
        feedback at its start has listened for ABANDONED_AFTER_S.
        """
        if not self._goals:
            return
        infos = self._node.get_subscriptions_info_by_topic(self._feedback_topic)
        present = frozenset(bytes(info.endpoint_gid) for info in infos)
        now = time.monotonic()
        for goal in list(self._goals.values()):
            goal.listeners = goal.listeners or present
            if not goal.listeners or goal.listeners & present:
                goal.alone_since = None
            elif goal.alone_since is None:
                goal.alone_since = now
            elif now - goal.alone_since >= ABANDONED_AFTER_S and goal.stream is not None:
                self._node.get_logger().warning("a goal's client is gone: cancelling it")
                goal.stream.cancel(AbandonedError("the client is gone"))

    def destroy(self) -> None:
        """Destroy the action server."""
        self._server.destroy()

    def _accepted(self, handle: ServerGoalHandle) -> None:
        goal = _Goal(handle)
        self._goals[bytes(handle.goal_id.uuid)] = goal
        # At once: `ros2 action send_goal` can only cancel on Ctrl-C after a feedback.
        self._publish(goal, Batch(Phase.QUEUED, "", "", 0, 0))
        goal.stream = Stream(self._streamer, lambda batch: self._pass_on(goal, batch), lambda end: self._end(goal, end))
        self._start(handle.request, goal.stream)

    def _cancel(self, handle: ServerGoalHandle) -> CancelResponse:
        goal = self._goals.get(bytes(handle.goal_id.uuid))
        if goal is not None and goal.stream is not None:
            goal.stream.cancel()
        return CancelResponse.ACCEPT

    def _pass_on(self, goal: _Goal, batch: Batch) -> None:
        """Streamer's thread, or the engine's."""
        self._publish(goal, batch)
        if batch.phase >= Phase.DECODE:
            self._begin(goal)

    def _end(self, goal: _Goal, outcome: Outcome) -> None:
        """Streamer's thread, the engine's, or the one that submits."""
        goal.ended.set_result(outcome)
        if goal.begun:
            self._node.executor.wake()
        else:
            self._begin(goal)

    def _begin(self, goal: _Goal) -> None:
        if not goal.begun:
            goal.begun = True
            self._node.executor.create_task(goal.handle.execute)

    def _publish(self, goal: _Goal, batch: Batch) -> None:
        message = Chat.Feedback()
        message.state = min(int(batch.phase), Chat.Feedback.STATE_DECODE)
        message.queue_position = batch.queue_position
        message.completion_tokens = batch.completion_tokens
        message.seq, message.offset, message.reasoning_offset = goal.seq, goal.offset, goal.reasoning_offset
        message.delta, message.reasoning_delta = batch.text, batch.reasoning
        goal.seq += 1
        goal.offset += len(batch.text)
        goal.reasoning_offset += len(batch.reasoning)
        goal.handle.publish_feedback(message)

    async def _execute(self, handle: ServerGoalHandle) -> Any:
        """Wait for the end, then build the result, set the state and return at once, in this order (rclpy#1598)."""
        key = bytes(handle.goal_id.uuid)
        goal = self._goals[key]
        outcome: Outcome = await goal.ended
        result = fill_result(
            Chat.Result(), outcome.text, outcome.reasoning, outcome.reason, outcome.usage, outcome.error
        )
        del self._goals[key]
        if outcome.error is not None:
            handle.abort()
        elif outcome.reason is FinishReason.CANCELLED:
            handle.canceled()
        else:  # also when a cancel came too late
            handle.succeed()
        return result
