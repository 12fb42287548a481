"""Attentions to compare V4's with, behind the same interface: every token is kept, and nothing is pooled."""
