"""Where the shipped Base checkpoint lies."""

from pathlib import Path

BASE = Path(__file__).parent / "checkpoint"
