"""What the built-in trainers share."""
