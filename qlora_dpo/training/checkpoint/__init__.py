"""Checkpoints of a run: saved, verified, and restored byte for byte."""
