"""GRPO on audio: the trainer and the shared prompt."""
