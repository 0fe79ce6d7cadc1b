"""Writing data with models: the journal of everything generated."""
