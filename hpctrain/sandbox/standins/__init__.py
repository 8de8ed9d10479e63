"""Stand-ins for what a site has and this machine has not: singularity, environment modules, node
names."""
