"""The robots' computers that `edgellm plan` knows, with what their makers publish.

Sources: NVIDIA's data sheets of Jetson Orin Nano, Orin NX, AGX Orin and Jetson Thor (memory size and bandwidth at the
highest power mode), its technical brief of AGX Orin, the largest of them (L2 cache), and, for Thor's L2 cache, TVM's
target nvidia/jetson-agx-thor. Nothing here was measured by this project.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One computer. Memory is shared by CPU and GPU on all of these."""

    name: str
    memory_gb: float  # 10^9 bytes, as a data sheet means it
    bandwidth_gb_per_s: float
    compute_capability: tuple[int, int]
    power_mode: str  # in which the bandwidth is reached

    @property
    def has_dependent_launch(self) -> bool:
        """Whether a kernel can start loading while its predecessor still runs (compute capability 9.0 and newer)."""
        return self.compute_capability >= (9, 0)

    @property
    def l2_bytes(self) -> int:
        """Bytes of the GPU's L2 cache; of an Orin the largest one's."""
        return 4 << 20 if self.compute_capability == (8, 7) else 32 << 20


# A "GB" of a module's memory is 2^30 bytes.
_GIB = 1.073741824

DEVICES: dict[str, Device] = {
    "orin-nano": Device("Jetson Orin Nano 8GB", 8 * _GIB, 102.0, (8, 7), "MAXN SUPER, 25 W (JetPack 6.1 and newer)"),
    "orin-nano-4gb": Device("Jetson Orin Nano 4GB", 4 * _GIB, 51.0, (8, 7), "MAXN SUPER, 25 W"),
    "orin-nx": Device("Jetson Orin NX 16GB", 16 * _GIB, 102.4, (8, 7), "MAXN SUPER, 40 W"),
    "orin-nx-8gb": Device("Jetson Orin NX 8GB", 8 * _GIB, 102.4, (8, 7), "MAXN SUPER, 40 W"),
    "agx-orin": Device("Jetson AGX Orin 64GB", 64 * _GIB, 204.8, (8, 7), "MAXN, 60 W"),
    "agx-orin-32gb": Device("Jetson AGX Orin 32GB", 32 * _GIB, 204.8, (8, 7), "MAXN, 40 W"),
    "thor": Device("Jetson AGX Thor T5000", 128 * _GIB, 273.0, (11, 0), "MAXN, 130 W"),
}
