"""The record of a run while it goes on: metrics.jsonl, progress, and experiment trackers."""
