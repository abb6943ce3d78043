"""Qwen2-Audio: its parts, decoding, checkpoints, and a small one with random weights."""
