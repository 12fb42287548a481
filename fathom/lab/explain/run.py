"""`fathom explain`: from a model and a text to one HTML file."""

from pathlib import Path

from rich.console import Console

from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import find_model
from fathom.config import ModelConfig
from fathom.errors import InputError
from fathom.files import write_text
from fathom.lab.explain.page import Subject, page
from fathom.lab.explain.record import record
from fathom.model.transformer import Transformer
from fathom.text.tokenizer import Tokenizer

MOST_TOKENS = 512
UNTRAINED = "untrained example"
# Jane Austen, Pride and Prejudice (1813), chapter 1.
TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. However little known "
    "the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so well fixed in the minds of the "
    "surrounding families, that he is considered as the rightful property of some one or other of their daughters.\n"
    "\"My dear Mr. Bennet,\" said his lady to him one day, \"have you heard that Netherfield Park is let at last?\" Mr. Bennet replied that he "
    "had not. \"But it is,\" returned she; \"for Mrs. Long has just been here, and she told me all about it.\"")


def explain(path: Path | None, text: str | None, out: Path, seed: int, console: Console) -> Path:
    """Read `text` with the model at `path`, or with a small one of random weights from `seed`, and write the page to `out`.

    InputError for an empty text, or one of more than MOST_TOKENS tokens.
    """
    if out.is_dir():
        raise InputError(f"{out} is a folder; give the name of a file, such as --out {out / 'explain.html'}")
    text = TEXT if text is None else text
    if not text:
        raise InputError("the text is empty; give one with --text, or none for an example")
    model, tokenizer = untrained_example(text, seed) if path is None else _load(path)
    tokens = [tokenizer.bos_id, *tokenizer.encode(text)]
    if len(tokens) > MOST_TOKENS:
        raise InputError(f"the text has {len(tokens)} tokens; a page shows at most {MOST_TOKENS}, so give a shorter --text")
    name = UNTRAINED if path is None else path.resolve().name
    with console.status(f"reading {len(tokens)} tokens ..."):
        seen = record(model, tokens)
        html = page(model, tokenizer, seen, Subject(name, trained=path is not None))
    write_text(out, html)
    console.print(f"done: {out}  (open it in a browser)", soft_wrap=True, highlight=False, markup=False)
    return out


def untrained_example(text: str, seed: int) -> tuple[Transformer, Tokenizer]:
    """The preset `tiny` with random weights and a vocabulary made from the text; its reach is small enough to be seen in a short text."""
    tokenizer = Tokenizer.train([text], 512)
    config = ModelConfig.preset("tiny", vocab_size=tokenizer.vocab_size, sliding_window=16, index_topk=8, compress_ratios=[0, 4, 32, 4, 0])
    return Transformer(config).initialise(seed).eval(), tokenizer


def _load(path: Path) -> tuple[Transformer, Tokenizer]:
    folder = find_model(path)
    tokenizer, config = Tokenizer.load(folder), ModelConfig.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}")
    return load_model(folder), tokenizer
