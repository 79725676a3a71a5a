"""A node in its own process, and what tests ask of it from outside through plain rclpy."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile

ROOT = Path(__file__).resolve().parent.parent.parent


def _forbid_huge_pages() -> None:
    """prctl(PR_SET_THP_DISABLE): the kernel merging pages would look like growth, 2 MB at a time."""
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)


class NodeProcess:
    """`python -m edgellm_ros.ros.llm_node`; in a `with`, it is active at the start and stopped at the end."""

    def __init__(
        self,
        bundle: Path | str,
        parameters: dict[str, Any] | None = None,
        wait_active: bool = True,
        huge_pages: bool = True,
        program: tuple[str, ...] = ("-m", "edgellm_ros.ros.llm_node"),
    ) -> None:
        command = [sys.executable, *program, "--ros-args", "-p", f"bundle:={bundle}"]
        # not auto: the lengths of these tests' answers are for a CPU, and a GPU would be through too soon
        for name, value in {"engine.executor": "onnxruntime", **(parameters or {})}.items():
            command += ["-p", f"{name}:={str(value).lower() if isinstance(value, bool) else value}"]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        self._wait_active = wait_active
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            preexec_fn=None if huge_pages else _forbid_huge_pages,
        )

    def __enter__(self) -> NodeProcess:
        if self._wait_active:
            with Probe() as probe:
                probe.wait_for(lambda: probe.state() == "active", 60)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            assert self.stop() == 0, self.log()

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Signal the process and return its exit status."""
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def log(self) -> str:
        """Everything it printed."""
        self._log.seek(0)
        return self._log.read()

    def resident_bytes(self) -> int:
        """Resident memory of the process."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096


class Probe:
    """A plain rclpy node that calls services of a node and listens to its topics."""

    def __init__(self, target: str = "llm") -> None:
        self._owns = not rclpy.ok()
        if self._owns:
            rclpy.init()
        self._target = target
        self.node = rclpy.create_node(f"probe_{time.monotonic_ns()}")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._clients: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except rclpy.executors.ExternalShutdownException:
            pass

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
        self._thread.join()
        self.node.destroy_node()
        if self._owns:
            rclpy.try_shutdown()

    def on_its_thread(self, function: Callable[[], None]) -> None:
        """Run `function` where the node's callbacks run.

        A goal must be sent there: rclpy notes a request after it has sent it, and drops an answer that another thread
        has read by then (ros2/rclpy issue 1123).
        """
        self._executor.create_task(function)

    def call(self, kind: Any, name: str, request: Any, timeout_s: float = 30.0) -> Any:
        """Response of a service of the target."""
        if name not in self._clients:
            self._clients[name] = self.node.create_client(kind, f"{self._target}/{name}")
        client = self._clients[name]
        assert client.wait_for_service(timeout_s), f"no service {name}"
        done = threading.Event()
        responses: list[Any] = []

        def answer(future: Any) -> None:
            responses.append(future.result())
            done.set()

        # on the executor's thread: rclpy loses a response that comes before call_async has noted the request
        self._executor.create_task(lambda: client.call_async(request).add_done_callback(answer))
        if not done.wait(timeout_s):
            raise TimeoutError(f"no response from {name} within {timeout_s} s")
        return responses[0]

    def state(self) -> str:
        """Label of the lifecycle state."""
        from lifecycle_msgs.srv import GetState

        for _ in range(3):
            # A node that has not discovered this one's reader within 0.1 s drops the answer (rmw_fastrtps).
            with contextlib.suppress(TimeoutError):
                return self.call(GetState, "get_state", GetState.Request(), 10.0).current_state.label
        raise AssertionError("the node did not say its state in 30 s")

    def change(self, label: str) -> bool:
        """Make a lifecycle transition."""
        from lifecycle_msgs.srv import ChangeState

        request = ChangeState.Request()
        request.transition.label = label
        return bool(self.call(ChangeState, "change_state", request).success)

    def listen(self, kind: Any, topic: str, latched: bool = False) -> list[Any]:
        """The messages of a topic from now on, a list that grows."""
        found: list[Any] = []
        durability = DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE
        self.node.create_subscription(kind, topic, found.append, QoSProfile(depth=100, durability=durability))
        self._executor.wake()
        return found

    def diagnostics(self) -> Callable[[], dict[str, str]]:
        """A function that waits for the next message on /diagnostics and returns its values."""
        from diagnostic_msgs.msg import DiagnosticArray

        messages = self.listen(DiagnosticArray, "/diagnostics")

        def newest() -> dict[str, str]:
            count = len(messages)
            self.wait_for(lambda: len(messages) > count, 10)
            status = messages[-1].status[0]
            level = {"level": str(int.from_bytes(status.level, "little")), "message": status.message}
            return level | {pair.key: pair.value for pair in status.values}

        return newest

    @staticmethod
    def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait until `condition` holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s"
            time.sleep(0.02)


def run_client(*arguments: str, stderr: int | None = None) -> subprocess.Popen:
    """A client process, once its answer has begun."""
    command = [sys.executable, str(Path(__file__).with_name("stream_client.py")), *arguments]
    profile = str(Path(__file__).with_name("short_lease.xml"))
    environment = os.environ | {f"{name}_DEFAULT_PROFILES_FILE": profile for name in ("FASTRTPS", "FASTDDS")}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
    )
    assert process.stdout.readline() == "begun\n"
    return process
