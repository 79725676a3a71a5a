"""Which LoRA adapters an executor has loaded, by name and place; places are numbered from 1 and used again."""

from __future__ import annotations

from edgellm_ros.errors import RequestError
from edgellm_ros.executors.base import LoadedAdapter


class AdapterTable:
    """Names, places and their bounds; what lies in a place is the executor's."""

    def __init__(self, num_places: int) -> None:
        """`num_places` is max_loras."""
        self._num_places = num_places
        self.loaded: dict[str, LoadedAdapter] = {}

    def free_place(self, name: str) -> int:
        """Where a new adapter `name` would go; raises RequestError for a name that is taken or when all are used."""
        if not name or name in self.loaded:
            raise RequestError(
                f"the adapter cannot be named {name!r}; the name must be new: loaded are {self._names()}"
            )
        used = {adapter.index for adapter in self.loaded.values()}
        index = next((i for i in range(1, self._num_places + 1) if i not in used), 0)
        if not index:
            raise RequestError(
                f"adapter {name!r} has no place: max_loras is {self._num_places}, loaded are {self._names()}; unload "
                "one, or load the model with a larger max_loras"
            )
        return index

    def add(self, name: str, index: int, fingerprint: str) -> LoadedAdapter:
        """Note what was loaded into the place that `free_place` gave."""
        self.loaded[name] = LoadedAdapter(index, fingerprint)
        return self.loaded[name]

    def remove(self, name: str) -> int:
        """Forget an adapter and return its place; raises RequestError for an unknown name."""
        if name not in self.loaded:
            raise RequestError(f"no adapter is named {name!r}; loaded are {self._names()}")
        return self.loaded.pop(name).index

    def _names(self) -> str:
        return ", ".join(sorted(self.loaded)) or "none"
