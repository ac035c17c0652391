"""Numbers from finished steps only."""
