"""What everything stands on: errors, units, paths, whole files, printing, shell text."""
