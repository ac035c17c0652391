"""Steps done once: the store, the schedule, and where a step runs."""
