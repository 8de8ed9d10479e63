"""Looks at the nodes of an allocation before they train: `step` is what every rank runs, `allocation` starts and judges it."""
