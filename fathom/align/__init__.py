"""Post-training: from a base model to one that answers."""
