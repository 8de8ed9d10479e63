"""The only caller of Slurm's commands, and what their text says."""
