"""Tokens in, tokens out: prefill in chunks, then one token at a time, streamed as they are chosen."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import find_model
from fathom.engine.sampler import Sampler, Sampling
from fathom.errors import InputError
from fathom.model.transformer import Transformer
from fathom.text.tokenizer import Tokenizer

PREFILL_CHUNK = 1024  # tokens; bounds the memory of a long prompt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name; InputError for one that models are not computed in."""
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}; allowed: {', '.join(DTYPES)}")
    return DTYPES[name]


class Engine:
    """A model with its tokenizer, ready to generate."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, quantized_cache: bool = False):
        self.model, self.tokenizer, self.quantized_cache = model.eval(), tokenizer, quantized_cache

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu",
             packed: bool = False) -> "Engine":
        """Open a model folder, or the newest checkpoint of a run folder; it must hold a tokenizer.

        `packed` computes as the release does: FP8 and FP4 weights stay as stored, and the cache is in FP8 and FP4.
        """
        folder = find_model(path)
        tokenizer = Tokenizer.load(folder)
        model = load_model(folder, dtype, device, packed=packed, simulate_quantization=packed)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise InputError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}")
        return cls(model, tokenizer, packed)

    def stream(self, prompt: Sequence[int], sampling: Sampling, stop_ids: Sequence[int] = ()) -> Iterator[int]:
        """Generated token ids, one by one; ends after the model's end token or one of `stop_ids` (also yielded),
        after sampling.max_tokens, or where the context is full.

        Raises InputError, before anything is computed, for an empty prompt, one that leaves no room in
        max_position_embeddings, or ids outside the vocabulary.
        """
        config = self.model.config
        if not prompt:
            raise InputError("the prompt is empty; give at least one token")
        if len(prompt) >= config.max_position_embeddings:
            raise InputError(f"the prompt has {len(prompt)} tokens; the model holds {config.max_position_embeddings} "
                             "(max_position_embeddings), the answer included")
        wrong = [token for token in prompt if not 0 <= token < config.vocab_size]
        if wrong:
            raise InputError(f"token id {wrong[0]} is outside the vocabulary of {config.vocab_size} ids")
        return self._generate(list(prompt), sampling, {config.eos_token_id, *stop_ids})

    def _generate(self, prompt: list[int], sampling: Sampling, stop_ids: set[int]) -> Iterator[int]:
        limit = min(sampling.max_tokens, self.model.config.max_position_embeddings - len(prompt))
        cache = self.model.new_cache(1, len(prompt) + limit, self.quantized_cache)
        sampler, device = Sampler(sampling), cache.length_B.device
        known = self.tokenizer.vocab_size  # the model's vocabulary may have rows that no token uses
        for begin in range(0, len(prompt), PREFILL_CHUNK):
            chunk = torch.tensor([prompt[begin:begin + PREFILL_CHUNK]], device=device)
            logits_V = self.model(chunk, cache=cache, last_only=True).logits[0, 0, :known]
        for made in range(1, limit + 1):
            token = sampler.next_token(logits_V)
            yield token
            if token in stop_ids or made == limit:
                return
            logits_V = self.model(torch.tensor([[token]], device=device), cache=cache).logits[0, 0, :known]

    def text(self, prompt: str, sampling: Sampling, special: bool = False) -> Iterator[str]:
        """Continue plain text, piece by piece; the end token is not written. `special` reads special tokens in the prompt."""
        ids = self.tokenizer.encode(prompt, special=special)
        if not ids:
            raise InputError("the prompt is empty; give at least one character")
        stream = self.tokenizer.stream()
        for token in self.stream([self.tokenizer.bos_id, *ids], sampling):
            if token != self.model.config.eos_token_id:
                yield stream.push(token)
        yield stream.flush()
