"""A run's model beside compressors and an n-gram, all on the same held-out bytes."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fathom.data.store import TokenStore
from fathom.engine.engine import Engine
from fathom.errors import DataError
from fathom.evals.baselines import gzip_bits_per_byte, lzma_bits_per_byte, ngram_bits_per_byte
from fathom.evals.perplexity import bits_per_byte, held_out_batches, token_byte_lengths
from fathom.text.tokenizer import Tokenizer

ORDERS = (1, 3, 5, 7)


def compare(path: Path, sequence_length: int, console: Console) -> dict[str, float]:
    """Bits per byte of the model of run `path` and of each baseline on the run's whole held-out text; prints a table.

    The baselines read the same training text. Raises DataError where `path` is no run with data.
    """
    if not (path / "data" / "held_out").is_dir():
        raise DataError(f"{path} has no data/held_out; eval takes the folder of a pre-training run")
    engine = Engine.load(path)
    train, held_out = (TokenStore.open(path / "data" / part) for part in ("train", "held_out"))
    console.print(f"reading {held_out.manifest['bytes'] / 1e6:.2f} MB of held-out text with the model", soft_wrap=True)
    batches = held_out_batches(held_out, sequence_length, engine.tokenizer.pad_id)
    lengths_V = token_byte_lengths(engine.tokenizer, engine.model.config.vocab_size)
    scores = {"this model": bits_per_byte(engine.model, batches, lengths_V)}
    console.print("and with the baselines", soft_wrap=True)
    train_bytes, held_out_bytes = (_bytes(store, engine.tokenizer) for store in (train, held_out))
    scores["gzip -9"] = gzip_bits_per_byte(held_out_bytes)
    scores["xz -9 after the training text"] = lzma_bits_per_byte(held_out_bytes, train_bytes)
    for order in ORDERS:
        scores[f"byte {order}-gram (Kneser-Ney)"] = ngram_bits_per_byte(train_bytes, held_out_bytes, order)
    table = Table("on the same held-out text", "bits per byte")
    for name, score in sorted(scores.items(), key=lambda item: item[1]):
        table.add_row(name, f"{score:.3f}", style="bold" if name == "this model" else None)
    console.print(table)
    return scores


def _bytes(store: TokenStore, tokenizer: Tokenizer) -> bytes:
    """The text of all documents end to end."""
    return "\n".join(tokenizer.decode(store.document(index)[1:-1].tolist())
                     for index in range(len(store.lengths))).encode()
