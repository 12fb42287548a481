"""A prepared corpus as a run sees it: the run keeps the tokenizer and the held-out text, and points to the rest."""

import json
import os
import shutil
from pathlib import Path

from fathom.data.store import MANIFEST, TokenStore
from fathom.errors import DataError
from fathom.files import sha256

COPIED, LINKED = ("held_out",), ("train", "long")


def adopt(prepared: Path, run: Path) -> None:
    """Give a run the corpus of `fathom data prepare` in `prepared`, as its tokenizer/ and data/.

    What is small is copied, so that a run can be moved and evaluated alone; the stores that only training reads are
    links. DataError where `prepared` is no corpus, or a file of it is missing or does not match its checksum.
    """
    try:
        manifest = json.loads((prepared / MANIFEST).read_text(encoding="utf-8"))
        expected, parts = manifest["files"], [part for part in (*COPIED, *LINKED) if f"{part}/{MANIFEST}" in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{prepared} is no prepared corpus; make one with fathom data prepare RECIPE.toml") from error
    for name, checksum in expected.items():
        if not (prepared / name).is_file() or sha256(prepared / name) != checksum:
            raise DataError(f"{prepared / name} is missing or changed; delete {prepared} and prepare the data again")
    for part in parts:
        TokenStore.open(prepared / part, verify=True)
    shutil.rmtree(run / "data", ignore_errors=True)
    (run / "data").mkdir(parents=True)
    shutil.copytree(prepared / "tokenizer", run / "tokenizer", dirs_exist_ok=True)
    for part in parts:
        if part in COPIED:
            shutil.copytree(prepared / part, run / "data" / part)
        else:
            os.symlink((prepared / part).resolve(), run / "data" / part, target_is_directory=True)
    shutil.copy(prepared / MANIFEST, run / "data" / "corpus.json")
