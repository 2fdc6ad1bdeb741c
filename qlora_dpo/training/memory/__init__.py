"""What a run will take in memory, and how long its rows may be."""
