"""What an experiment is, before anything is done."""
