"""Paths of the folders that tests read."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"
TINY = GOLDEN / "hf_tiny"
