"""Token streams: documents with provenance, packed into training sequences."""
