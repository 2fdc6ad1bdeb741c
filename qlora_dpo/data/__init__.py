"""Preference data: where it comes from, what shape it has, what is wrong with it, and how it becomes tokens."""
