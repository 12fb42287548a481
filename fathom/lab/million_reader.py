"""A model that reads one text through a cache, always cut at the same places, and can go back to where it has been.

Tokens before a place leave the same cache whatever follows them, so a text that differs from there on is read again only from there:
entries behind the place are overwritten, and only rings and tails have to be put back.
"""

import math
from collections.abc import Callable, Collection, Iterator

from torch import Tensor

from fathom.config import ModelConfig
from fathom.engine.graphs import Steps
from fathom.model.cache import Cache
from fathom.model.transformer import Transformer


class Reader:
    """Reads `token_T` in chunks of at most `chunk` tokens that end at every one of `stops`; the cache has `room` for more tokens.

    At the places in `keep` (stops as well) it remembers what `back_to` needs.
    """

    def __init__(self, model: Transformer, token_T: Tensor, chunk: int, stops: Collection[int] = (),
                 keep: Collection[int] = (), room: int = 0):
        self.model, self.token_T, self.chunk = model, token_T, chunk
        self.keep = sorted(keep)
        self.stops = sorted({*stops, *keep, len(token_T)})
        self.cache = model.new_cache(1, capacity(model.config, len(token_T) + room + Steps.spare(model.config)))
        self._steps = Steps(model, self.cache)
        self._kept: dict[int, list[Tensor]] = {}

    def chunks(self, begin: int = 0) -> Iterator[tuple[int, int]]:
        """Where each chunk from `begin` on (0 or a stop) begins and ends."""
        for stop in self.stops:
            while begin < stop:
                end = min(begin + self.chunk, stop)
                yield begin, end
                begin = end

    def read_chunk(self, begin: int, end: int) -> Tensor:
        """Logits [V] after the token before `end`; the cache must stand at `begin`."""
        logits_V = self.step(self.token_T[begin:end])
        if end in self.keep and end not in self._kept:
            self._kept[end] = state(self.cache)
        return logits_V

    def read(self, begin: int = 0, seen: Callable[[int], None] = lambda tokens: None) -> Tensor:
        """Read from `begin` to the end of the text; logits [V] of its last token. `seen` gets the length of every chunk."""
        for start, end in self.chunks(begin):
            logits_V = self.read_chunk(start, end)
            seen(end - start)
        return logits_V

    def step(self, token_S: Tensor) -> Tensor:
        """Logits [V] after tokens that the text need not have; a single one as a recorded step, where it can be."""
        if len(token_S) == 1:
            return self._steps.step(token_S.tolist())[0].clone()
        return self.model(token_S[None], cache=self.cache, last_only=True).logits[0, 0]

    def back_to(self, place: int) -> None:
        """Put the cache back to a place in `keep` that has been passed."""
        restore(self.cache, self._kept[place])


def capacity(config: ModelConfig, tokens: int) -> int:
    """Tokens to allocate for `tokens`: up to whole blocks of every ratio, where the model's positions allow it."""
    whole = math.lcm(1, *(ratio for ratio in config.compress_ratios if ratio))
    return max(tokens, min(-(-tokens // whole) * whole, config.max_position_embeddings))


def state(cache: Cache) -> list[Tensor]:
    """Copies of what further tokens change of the past: length, rings and tails. Entries are only added behind it."""
    return [tensor.clone() for tensor in _changing(cache)]


def restore(cache: Cache, saved: list[Tensor]) -> None:
    """Forget the tokens since `state`."""
    for tensor, old in zip(_changing(cache), saved, strict=True):
        tensor.copy_(old)


def _changing(cache: Cache) -> list[Tensor]:
    streams = [stream for layer in cache.layers for stream in (layer.entries, layer.keys) if stream is not None]
    return [cache.length_B, *(layer.window.items_BRC for layer in cache.layers), *(stream.tail.items_BRC for stream in streams)]
