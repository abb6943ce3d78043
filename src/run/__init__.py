"""Attachments of a training run; the packages of the core do not import them."""
