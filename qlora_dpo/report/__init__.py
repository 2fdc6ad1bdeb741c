"""Presents finished runs: tables, samples side by side, plots, model card, report page and the next commands."""
