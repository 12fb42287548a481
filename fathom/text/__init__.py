"""Tokens and chat: everything between characters and token ids."""
