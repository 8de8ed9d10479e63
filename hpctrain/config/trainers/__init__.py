"""The built-in trainers' own configuration files."""
