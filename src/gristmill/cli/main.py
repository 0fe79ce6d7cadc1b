"""`gristmill`: the application with all its commands."""

from gristmill.cli import data, judges, models, plan, runs, safety, studio  # noqa: F401  (each registers its commands)
from gristmill.cli.app import app

__all__ = ["app"]
