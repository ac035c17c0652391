"""Numbers out of texts, verdicts and logs: weighing, intervals, coherence, diversity, the verdict on amplification."""
