"""Talking to a model: batched greedy answers, and a conversation in the terminal."""
