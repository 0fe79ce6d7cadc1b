"""Columns of text as bytes, and what is measured of them."""
