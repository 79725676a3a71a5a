"""Measures a bundle against the checkpoint that it was made from, and judges it by the marks of its scheme."""
