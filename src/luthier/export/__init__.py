"""Out of the door: merged weights, the Hugging Face folder, GGUF, and Ollama's Modelfile. One file for each kind."""
