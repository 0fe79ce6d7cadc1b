"""Run folders: stages, artifacts, the journal, and executors of tasks."""
