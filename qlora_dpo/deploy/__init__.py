"""Turns an adapter directory into what other programs load: full models on disk or on a hub."""
