"""Fakes: users can name them in a recipe, and tests use them."""
