"""Evaluates an adapter on held-out pairs and benchmarks, and how faithful a merged model is."""
