"""Estimates what a run will take before it starts: memory, time, and advice (`check`)."""
