"""GGUF, llama.cpp's file format: the converted base, the adapter, both merged, and an Ollama Modelfile."""
