"""Direct preference optimization with FSDP2, from the keys of `config_dpo.yaml`; run inside jobs,
imported by nobody."""
