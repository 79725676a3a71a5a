"""The unit tests share helper modules of this directory; pytest's importlib mode does not put it on the path itself."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
