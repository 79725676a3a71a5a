"""Readers of checkpoints that others have quantised: which tensors make a weight, and its integers and scales."""
