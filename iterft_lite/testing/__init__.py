"""Stand-ins that a user can choose, and that tests use."""
