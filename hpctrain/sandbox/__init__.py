"""A real Slurm on this machine, shaped like a site: same partitions, limits and node shape,
simulated nodes."""
