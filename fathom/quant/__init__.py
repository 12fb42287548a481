"""The number formats of the release. formats.py defines them; rounding.py hands them to a model, records.py to its cache."""
