"""In-process inference: requests in, responses with token counts and log-probabilities out."""
