"""Names on disk: the released layout and the state of a training run."""
