"""Other people's sbatch scripts, read into a run.yaml. Nothing of them is run."""
