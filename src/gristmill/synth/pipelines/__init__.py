"""The prompt pipelines, one file each."""
