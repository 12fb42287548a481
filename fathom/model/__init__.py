"""The architecture: one batch, one model, its cache. Start at transformer.py."""
