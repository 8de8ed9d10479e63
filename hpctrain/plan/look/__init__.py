"""`check` opens what lies in front of it: data, programs, models, working copies, packages."""
