"""Training on several processes: the groups that they form, and what is cut over them."""
