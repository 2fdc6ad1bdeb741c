"""Readers of data files: text lines, JSON in its several forms, CSV, and Arrow tables."""
