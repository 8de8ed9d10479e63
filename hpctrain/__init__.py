"""hpctrain: one run.yaml becomes the Slurm jobs, configs and checkpoint chain of an LLM training
run."""

__version__ = "0.1.0"
