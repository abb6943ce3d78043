"""Attachments of a run that its scripts compose: launcher, signals, checkpoints, checks."""
