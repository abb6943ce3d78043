"""Rewards, scores and tables."""
