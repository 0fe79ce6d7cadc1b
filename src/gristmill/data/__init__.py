"""Rows, conversations, tokenizers, and the files that users bring."""
