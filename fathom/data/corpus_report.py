"""What a prepared corpus holds, as a table: from its manifest, and from packing its stores."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fathom.data.packing import PackedData
from fathom.data.store import MANIFEST, TokenStore

LENGTHS = (1024, 4096)  # of rows for which packing is measured


def describe(folder: Path, console: Console) -> None:
    """Print documents, megabytes and tokens of each source, what was left out and why, and how well rows are filled."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    table = Table("source", "documents", "MB", "tokens", "share", "held out")
    for column in table.columns[1:]:
        column.justify = "right"
    total = sum(source["train"]["tokens"] for source in manifest["sources"])
    for source in manifest["sources"]:
        train = source["train"]
        table.add_row(source["path"], f"{train['documents']:,}", f"{train['bytes'] / 1e6:.2f}", f"{train['tokens']:,}",
                      f"{train['tokens'] / total:.1%}", f"{source['held_out']['tokens']:,}")
    console.print(table)
    for source in manifest["sources"]:
        if source["dropped"]:
            reasons = ", ".join(f"{reason} {counts['documents']:,}" for reason, counts in source["dropped"].items())
            console.print(f"left out of {source['path']}: {reasons}", soft_wrap=True)
    store = TokenStore.open(folder / "train")
    filled = ", ".join(f"{PackedData(store, length, 0, 2).efficiency:.2%} of rows of {length}" for length in LENGTHS)
    console.print(f"{store.total_tokens:,} tokens, {store.manifest['bytes'] / store.total_tokens:.2f} bytes each; packed: {filled}", soft_wrap=True)
