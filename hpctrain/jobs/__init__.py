"""Queueing: the ledger, chains, side jobs, bad nodes, checkpoints, ladders, pipelines."""
