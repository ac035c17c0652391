"""The commands, a file each group of them; nothing heavy is imported before it is needed."""
