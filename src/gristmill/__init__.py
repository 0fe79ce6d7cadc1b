"""gristmill: Base, Instruct and Reward models that write, judge and learn from their own alignment data."""

__version__ = "0.1.0"
