"""Training: the loop, its optimizer, checkpoints, evaluations, and what is told while a run goes on."""
