"""Rehearse: a run's real job script through a real Slurm shaped like its site, with the training
step replaced."""
