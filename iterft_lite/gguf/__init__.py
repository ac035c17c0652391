"""GGUF: the base, the adapter, and the two merged; the Modelfile that serves them."""
