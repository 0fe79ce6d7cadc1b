"""Training on many devices: which layouts there are, and what a layout takes of memory and time. No module here imports torch."""
