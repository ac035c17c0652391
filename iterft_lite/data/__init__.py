"""What is shipped as data: traits, prompts, the nano models."""
