"""Lets the tests here import tiny.py: pytest's importlib mode leaves their directory out of the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
