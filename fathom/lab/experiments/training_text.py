"""What two experiments share: training documents that become other tokens than usual, while held-out ones stay as they are."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from fathom.data.corpora import Document
from fathom.data.store import TokenStore, build_store
from fathom.lab.experiment import swapped
from fathom.text.tokenizer import Tokenizer
from fathom.train import pretrain


def trained_on(ids: Callable[[str, Tokenizer], list[int]], setting: str) -> AbstractContextManager:
    """Inside, a run's training store holds `ids(text, tokenizer)` of each document; `setting` names what that does."""
    def build(folder: Path, documents: Sequence[Document], encode_many: Callable, **named: object) -> TokenStore:
        tokenizer: Tokenizer = encode_many.__self__
        if Path(folder).name != "train":
            return build_store(folder, documents, encode_many, **named)
        return build_store(folder, documents, lambda texts: [ids(text, tokenizer) for text in texts], settings={"changed": setting}, **named)
    return swapped((pretrain, "build_store", build))
