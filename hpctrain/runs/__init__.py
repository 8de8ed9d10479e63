"""What became of a run: its records, starts, status, logs, cost, diagnosis, report."""
