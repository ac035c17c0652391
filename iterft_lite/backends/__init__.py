"""What meets the protocols: each kind in a folder of its own, blind to the others."""
