"""The language model: families, weights in, decoder, LoRA, adapter out."""
