"""The commands, a file for each group. Each imports heavy modules only when it runs."""
