"""The training loop and pre-training."""
