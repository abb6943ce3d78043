"""Baselines of the paper that are not GRPO."""
