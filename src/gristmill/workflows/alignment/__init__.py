"""The alignment loop, as stages of a run folder."""
