"""The offline half: from a checkpoint to a bundle. Nothing here is imported on a robot."""
