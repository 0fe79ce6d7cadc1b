"""Path of the shipped Base checkpoint."""

from pathlib import Path

BASE = Path(__file__).parent / "checkpoint"
