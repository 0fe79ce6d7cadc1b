"""Training on many devices: the processes of one training, and the planner of layouts, which imports no torch."""
