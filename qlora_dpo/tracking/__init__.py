"""Records a run while it lasts: metrics.jsonl, log messages, progress bars and experiment trackers."""
