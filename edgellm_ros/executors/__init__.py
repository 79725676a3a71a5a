"""Executors: token ids in, logits out. `create_executor` picks one for a bundle."""
