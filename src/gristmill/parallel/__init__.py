"""Training on many devices: which layouts there are, and what a layout takes of memory and time. The planner imports no torch."""
