"""The double of libnvinfer and the program that drives it through TensorRT's headers, line by line."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[2]
# What tools/gpu_check.sh builds for the GPU that is here, and what `make test` builds for all of them.
PLACES = (ROOT / "build" / "nvinfer_double", ROOT / "build" / "native-check")
DIRECTORY = next((place for place in PLACES if (place / "libnvinfer_double.so").is_file()), None)
LIBRARY = DIRECTORY / "libnvinfer_double.so" if DIRECTORY else None
NO_DOUBLE = "" if LIBRARY else "libnvinfer_double.so is not built; `make test` does it where nvcc and NvInfer.h are"


class Driver:
    """A process with one engine; `call` sends a line and returns its answer, `logs` has what was logged with it."""

    def __init__(self, plan: Path) -> None:
        assert DIRECTORY is not None and LIBRARY is not None
        self.logs: list[str] = []
        self._process = subprocess.Popen(
            [DIRECTORY / "nvinfer_double_driver", LIBRARY, plan],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.version = self._answer()
        self.engine = self._answer()
        self.greeting, self.logs = self.logs[:1], self.logs[1:]

    def call(self, *words: Any) -> str:
        """The answer to one line."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> int:
        """End the process; its exit status."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self.logs = [line[4:].rstrip("\n") for line in self._process.stdout if line.startswith("log ")]
        return self._process.wait(timeout=60)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        self.logs = []
        for line in self._process.stdout:
            if not line.startswith("log "):
                return line.rstrip("\n")
            self.logs.append(line[4:].rstrip("\n"))
        raise RuntimeError(f"the driver ended with {self._process.wait(timeout=60)}: {self.logs}")


class Rig:
    """A driver whose engine has all its buffers on the GPU; `facts` are the plan's."""

    def __init__(self, driver: Driver, facts: dict[str, Any], folder: Path, max_batch: int) -> None:
        self.driver, self.facts, self.folder = driver, facts, folder
        self.bindings = {binding["name"]: binding for binding in facts["bindings"]}
        self.roles = {b["role"]: b["name"] for b in facts["bindings"] if b["layer"] < 0}
        self.max_batch = max_batch
        self.yes("create")
        sizes = [int(part.split()[1]) for part in driver.call("describe").split(" ; ") if part.startswith("memory ")]
        self.yes("alloc", "scratch", max(sizes))
        self.yes("memory", "scratch")
        for name, binding in self.bindings.items():
            if binding["role"].startswith("present_"):
                continue
            self.yes("alloc", name, self._most_bytes(binding))
            self.yes("bind", name, name, 0)
            if binding["role"].startswith("past_"):
                self.yes("bind", name.replace("past", "present"), name, 0)
        self.profile = 0

    def yes(self, *words: Any) -> None:
        """A call that must be answered with true."""
        answer = self.driver.call(*words)
        assert answer == "true", (words, answer, self.driver.logs)

    def use_profile(self, index: int) -> None:
        self.yes("profile", index)
        self.profile = index

    def prepare(
        self,
        embeds: npt.NDArray[Any],  # (batch, length, hidden) in the engine's dtype
        positions: npt.NDArray[np.int64],  # (batch, length)
        write_indices: npt.NDArray[np.int64],  # (batch)
        logit_indices: npt.NDArray[np.int64],  # (num_logits)
        ranks: dict[str, int] | None = None,  # of LoRA inputs, whose buffers hold an adapter; others get rank 0
    ) -> None:
        """Set every shape and upload the inputs."""
        values = {"embeds": embeds, "positions": positions, "write_indices": write_indices, "logit_indices": logit_indices}
        for role, array in values.items():
            self.upload(self.roles[role], array)
            self.yes("shape", self.roles[role], *array.shape)
        for name, binding in self.bindings.items():
            if binding["role"].startswith("past_"):
                self.yes("shape", name, len(embeds), *binding["shape"][1:])
            elif binding["role"] in ("lora_a", "lora_b"):
                rank = (ranks or {}).get(name, 0)
                self.yes("shape", name, *(rank if size == -1 else size for size in binding["shape"]))

    def upload(self, buffer: str, array: npt.NDArray[Any]) -> None:
        path = self.folder / "upload"
        path.write_bytes(np.ascontiguousarray(array).tobytes())
        self.yes("upload", buffer, path)

    def download(self, buffer: str) -> bytes:
        path = self.folder / "download"
        self.yes("download", buffer, path)
        return path.read_bytes()

    def logits(self, num_logits: int) -> npt.NDArray[np.float32]:
        """The first rows of the output."""
        width = self.bindings[self.roles["logits"]]["shape"][1]
        return np.frombuffer(self.download(self.roles["logits"]), np.float32)[: num_logits * width].reshape(-1, width)

    def _most_bytes(self, binding: dict[str, Any]) -> int:
        most = [profile.get(binding["name"], {}).get("max") for profile in self.facts["profiles"]]
        if binding["role"] == "logits":
            rows = max(p[self.roles["logit_indices"]]["max"][0] for p in self.facts["profiles"])
            most = [[rows, binding["shape"][1]]]
        element = {"int64": 8, "float32": 4}.get(binding["dtype"], 2)
        return max(int(np.prod(shape)) * element for shape in most) or 256
