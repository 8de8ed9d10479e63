"""A run on a site with a recipe becomes a Plan (pure: `make` and its parts decide and note why),
and a run directory."""
