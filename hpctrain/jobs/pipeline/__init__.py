"""Pipelines: runs that hand checkpoints or models on, queued as one graph. See
docs/pipelines.md."""
