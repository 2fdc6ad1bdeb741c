"""Preference pairs of a model's own answers: prompts, sampled answers, scores, and which two answers become a pair."""
