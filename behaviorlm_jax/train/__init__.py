"""Sharding, the jitted LoRA step, the loop and its checkpoints."""
