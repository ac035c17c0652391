"""Exported models that write."""
