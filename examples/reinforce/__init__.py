"""A language model trained with reinforcement learning three times; only the function that gives log-probabilities differs."""
