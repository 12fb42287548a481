"""What a model's cached entries depend on, as one name."""

import hashlib
from pathlib import Path

from fathom.errors import CheckpointError

LAYOUT = "1"  # of cached records; another layout is another name
_PIECE = 1 << 24


def model_fingerprint(folder: Path, *settings: str) -> str:
    """SHA-256 (hex) of a model folder's config and weights, and of the settings it is computed with. Reads all weights once."""
    digest = hashlib.sha256("\n".join((LAYOUT, *settings)).encode())
    try:
        for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
            digest.update(f"\n{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()
