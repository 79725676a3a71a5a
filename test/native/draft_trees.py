"""Trees of drafts that tests verify: each node's parent, -1 of a root."""

from __future__ import annotations

TREES = {
    "binary": [-1, 0, 0, 1, 1, 2, 2],
    "star": [-1, 0, 0, 0, 0],
    "two roots": [-1, -1, 0, 1, 1, 2, 3],
    "deep": [-1, 0, 0, 1, 3, 2, 4, 6, 5, 7, 9, 9],
    "one": [-1],
    "sixteen": [-1, 0, 0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 8, 9, 13, 14],
}


def path_to(parents: list[int], node: int) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]
