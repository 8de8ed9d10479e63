"""Supervised fine-tuning of a full-precision base through TRL's SFTTrainer; run inside jobs,
imported by nobody."""
