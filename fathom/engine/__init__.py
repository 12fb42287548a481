"""Generation: tokens in, tokens out."""
