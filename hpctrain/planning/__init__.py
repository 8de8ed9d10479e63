"""The parts of `hpctrain.plan`: pure functions that decide and note why; `notes.py` collects."""
