"""Miniature world: a small closed world whose truth is known, and its shipped Base checkpoint."""
