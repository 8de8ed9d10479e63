"""Real writers of checkpoints: each framework's own code saves them, and loads them again as the
judge."""
