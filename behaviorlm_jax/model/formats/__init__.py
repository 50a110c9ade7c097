"""Files of weights and tokenizers: safetensors, GGUF."""
