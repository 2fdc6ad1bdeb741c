"""From an adapter directory to what other programs load: full models on disk."""
