"""Whether this environment can run a recipe: Python, packages, caches, disks, secrets, working
copy, Slurm. Changes nothing."""
