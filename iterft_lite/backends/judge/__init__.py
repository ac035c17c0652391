"""Judges: providers, batches, models of the user's own, and the embedded classifier."""
