"""Train a language model three times; only the function that gives log-probabilities differs."""
