"""Figures of studies, in the paper's forms: a file for each form, what they share, and the table of all."""
