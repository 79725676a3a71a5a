"""How a node's process lives and ends: one executor thread, and a clean stop on SIGINT or SIGTERM.

The main thread waits for a signal; on one, running goals are cancelled and their results sent before rclpy stops.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions

if TYPE_CHECKING:
    from edgellm_ros.ros.llm_node import LLMNode

SEND_RESULTS_S = 2.0  # how long the results of cancelled goals may take to be sent
GIL_SWITCH_S = 0.0005  # Python's default of 5 ms is as long as a cancel may take to be answered


def run_node(make: Callable[[], LLMNode], args: list[str] | None = None) -> int:
    """Create the node, start it if autostart is set, and serve until a signal or a shutdown of the context."""
    sys.setswitchinterval(GIL_SWITCH_S)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        node = make()
    except Exception as error:  # impossible arguments or parameters; rclpy's own exceptions have no common base
        said = " ".join(str(error).split())  # of a YAML file's errors, some end their lines
        rclpy.logging.get_logger("edgellm_ros").fatal(f"{type(error).__name__}: {said}")
        rclpy.try_shutdown()
        return 1
    logging.getLogger("edgellm_ros").addHandler(_RosLogHandler(node))
    logging.getLogger("edgellm_ros").setLevel(logging.INFO)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    spinning = threading.Thread(target=_spin, args=(executor, stop), name="edgellm-executor", daemon=True)
    spinning.start()
    if node.parameters.node.autostart:
        executor.create_task(node.start)
    stop.wait()
    _stop(node, executor)
    executor.shutdown()
    rclpy.try_shutdown()
    spinning.join(timeout=5.0)
    node.destroy_node()
    return 0


def _spin(executor: SingleThreadedExecutor, stop: threading.Event) -> None:
    try:
        executor.spin()
    except ExternalShutdownException:
        pass
    finally:
        stop.set()


def _stop(node: LLMNode, executor: SingleThreadedExecutor) -> None:
    """Let the executor's thread cancel, drain and send the results."""
    stopped = threading.Event()

    def work() -> None:
        try:
            node.stop()
        finally:
            stopped.set()

    executor.create_task(work)
    stopped.wait(node.parameters.node.drain_timeout_s + SEND_RESULTS_S)
    deadline = time.monotonic() + SEND_RESULTS_S
    while node.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # DDS sends in its own threads


class _RosLogHandler(logging.Handler):
    """What the library logs goes where ROS logs go."""

    def __init__(self, node: LLMNode) -> None:
        super().__init__()
        self._logger = node.get_logger()

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.ERROR:
            self._logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(text)
        elif record.levelno >= logging.INFO:
            self._logger.info(text)
        else:
            self._logger.debug(text)

