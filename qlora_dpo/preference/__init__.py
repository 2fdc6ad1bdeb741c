"""The mathematics of preference training: batches, log-probabilities, losses, reference and metrics."""
