"""Requests and completions, and the clients that answer them: an endpoint, or any generator, through a journal."""
