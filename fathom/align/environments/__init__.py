"""Environments with verifiable rewards: mathematics, code, tool use, instruction following."""
