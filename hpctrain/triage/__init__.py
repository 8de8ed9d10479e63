"""Triage: what do the logs say about a run, why did it fail, and what should be done next?

`scan` finds lines, `formats` and `failures` know what they mean, `engine` keeps what matters,
`rules` and `judge` decide, `read` feeds files. Everything but `read` is pure.
"""
