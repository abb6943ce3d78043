"""Data: audio files, prompts and question files."""
