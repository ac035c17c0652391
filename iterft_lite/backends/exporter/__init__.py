"""From a trained adapter to the GGUF that writes and is measured."""
