"""Documents from files, and shards on disk."""
