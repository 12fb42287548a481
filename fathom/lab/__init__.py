"""Measurements: what the package costs on the machine at hand, beside other programs."""
