"""From a raw log to batches: events, prompts, conversations, plan, loader."""
