"""What this machine is, and how long things take on it."""
