"""llama.cpp as a library, shared by the generator and the local judge."""
