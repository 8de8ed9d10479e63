"""Looks at the nodes of an allocation before they train: starts `runtime/preflight.py` on every rank and shows what it found."""
