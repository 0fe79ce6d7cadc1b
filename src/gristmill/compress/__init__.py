"""Compression by Puzzle: libraries of alternative layers, their scores and costs, the search, FFN Fusion, exports."""
