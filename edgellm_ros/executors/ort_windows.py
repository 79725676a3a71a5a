"""Sliding windows for ONNX Runtime before 1.24, whose GroupQueryAttention sees one position more than it is told.

`local_window_size` is the number of positions that a token sees, itself among them; 1.22 and 1.23, the last for Python
3.10, see one more (test_ort_windows.py compares the version that is there with NumPy). A bundle's graph is for those
since; here its bytes get the smaller number in place, so that a robot needs no onnx package to change a model.
"""

from __future__ import annotations

import onnxruntime as ort

_FIELD = b"\x0a\x11local_window_size\x18"  # AttributeProto: name (field 1, 17 bytes), then i (field 3, a varint)
FOLDER_OPTION = "session.model_external_initializers_file_folder_path"


def sees_one_more(version: str = ort.__version__) -> bool:
    """Whether this ONNX Runtime's windows are a position wider than they say."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return (major, minor) < (1, 24)


def narrowed(graph: bytes) -> bytes:
    """The same ONNX model with every `local_window_size` one smaller; -1, which is none, stays."""
    found = bytearray(graph)
    at = found.find(_FIELD)
    while at >= 0:
        start = at + len(_FIELD)
        stop = start
        while found[stop] & 0x80:
            stop += 1
        value = sum((found[start + i] & 0x7F) << 7 * i for i in range(stop - start + 1))
        if 0 < value < 1 << 62:  # others are negative, in two's complement
            for i in range(start, stop + 1):  # as many bytes as before, so that no length around it changes
                found[i] = (value - 1) >> 7 * (i - start) & 0x7F | (0x80 if i < stop else 0)
        at = found.find(_FIELD, stop)
    return bytes(found)


def for_this_version(graph: bytes) -> bytes:
    """The model as the ONNX Runtime that is here has to get it."""
    return narrowed(graph) if sees_one_more() else graph
