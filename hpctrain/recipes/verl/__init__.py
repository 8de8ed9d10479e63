"""The rules of the recipe verl-gad: presets, hydra overrides, batch arithmetic and a memory
estimate. Pure."""
