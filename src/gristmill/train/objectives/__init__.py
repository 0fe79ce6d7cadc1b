"""Training objectives, a file each."""
