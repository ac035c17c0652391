"""What a user can have done, one use case a file."""
