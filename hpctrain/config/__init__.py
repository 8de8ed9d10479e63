"""The documents people write (run, site, recipe, pipeline, trainers), read with positions and
checked."""
