"""Supervised fine-tuning with DeepSpeed."""
