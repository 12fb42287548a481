"""Does a fact deep in a long text reach a query at its end? Logits with the fact beside logits without it.

The control is the same model without compressors and indexers: every layer reads its window only, so what lies further back than all
windows together cannot reach the query, and its logits must stay the same to the last bit.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fathom import ops
from fathom.lab.million_reader import Reader
from fathom.model.transformer import Transformer

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)

Seen = Callable[[int], None]  # gets the tokens read since its last call
Scorer = tuple[Tensor, Tensor, Tensor]  # index queries [1, 1, H, D] and head weights [1, 1, H] of the last token, keys [1, M, D]


@dataclasses.dataclass(frozen=True)
class Fact:
    """What a fact of `tokens` tokens from `place` on changed at the query, the last of `context` tokens."""

    context: int
    depth: float
    place: int
    tokens: int
    difference: float  # of logits, the largest
    spread: float  # standard deviation of the logits without the fact, to compare with
    kl: float  # nats, of the distribution without the fact from the one with it
    control: float | None  # the largest difference in the window-only model; None: not asked
    beyond_windows: bool  # the control must be 0
    selected: dict[int, int]  # entries of the fact that the query's indexers chose, by CSA layer
    entries: dict[int, int]  # of how many


def plant(model: Transformer, token_T: Tensor, fact_F: Tensor, chunk: int, depths: Sequence[float] = DEPTHS,
          seen: Seen = lambda tokens: None) -> Iterator[Fact]:
    """A Fact for each depth, the latest place first; reads only what follows a place again."""
    where = {place_at(len(token_T), depth): depth for depth in depths}
    reader, control = (Reader(each, token_T, chunk, keep=where) for each in (model, window_only(model)))
    plain_V, control_V = (each.read(seen=seen) for each in (reader, control))
    for place in sorted(where, reverse=True):
        difference = float((read_with(fact_F, control, place, seen) - control_V).abs().max())
        yield dataclasses.replace(observe(reader, plain_V, place, fact_F, seen), depth=where[place], control=difference)


def place_at(tokens: int, depth: float) -> int:
    """Where a fact at a depth of a text begins."""
    return int(tokens * depth)


def reading(tokens: int, depths: Sequence[float] = DEPTHS) -> int:
    """Tokens that `plant` reads, with both models."""
    return 2 * (tokens + sum(tokens - place_at(tokens, depth) for depth in depths))


def observe(reader: Reader, plain_V: Tensor, place: int, fact_F: Tensor, seen: Seen = lambda tokens: None) -> Fact:
    """The Fact at a place that `reader` kept; `plain_V` [V] are the logits without it. No control."""
    with _scorers(reader.model) as scorer_of:
        changed_V = read_with(fact_F, reader, place, seen)
    plain_V, changed_V = plain_V.double(), changed_V.double()
    log_p_V, log_q_V = plain_V.log_softmax(-1), changed_V.log_softmax(-1)
    config, T, last = reader.model.config, len(reader.token_T), place + len(fact_F) - 1
    planted = {layer: range(place // config.ratio(layer), min(last // config.ratio(layer) + 2, T // config.ratio(layer)))
               for layer in scorer_of}  # blocks overlap: an entry holds its own block and the one before
    selected = {layer: _selected(scorer, planted[layer], T // config.ratio(layer), config.index_topk)
                for layer, scorer in scorer_of.items()}
    return Fact(T, place / T, place, len(fact_F), float((changed_V - plain_V).abs().max()), float(plain_V.std()),
                float((log_p_V.exp() * (log_p_V - log_q_V)).sum()), None,
                T - 1 - last > config.num_hidden_layers * (config.sliding_window - 1), selected,
                {layer: len(entries) for layer, entries in planted.items()})


def read_with(fact_F: Tensor, reader: Reader, place: int, seen: Seen = lambda tokens: None) -> Tensor:
    """Logits [V] of the text's last token with the fact at a place that `reader` kept; its text stays as it was."""
    span = slice(place, place + len(fact_F))
    before_F = reader.token_T[span].clone()
    reader.back_to(place)
    reader.token_T[span] = fact_F
    try:
        return reader.read(place, seen)
    finally:
        reader.token_T[span] = before_F


def window_only(model: Transformer) -> Transformer:
    """The same weights, without compressors and indexers: all layers read their window."""
    config = dataclasses.replace(model.config, compress_ratios=(0,) * model.config.num_hidden_layers,
                                 num_nextn_predict_layers=0)
    plain, tensors = Transformer(config), model.state_dict()
    plain.load_state_dict({name: tensors[name] for name in plain.state_dict()}, assign=True)
    return plain.eval()


@contextmanager
def _scorers(model: Transformer) -> Iterator[dict[int, Scorer]]:
    """What each CSA layer's indexer scored with at the last token of the latest call."""
    latest: dict[int, Scorer] = {}

    def keeper(layer: int) -> Callable[..., None]:
        def keep(module: torch.nn.Module, inputs: tuple, scorer: Scorer) -> None:
            q_BSHD, weight_BSH, keys_BMD = scorer
            latest[layer] = q_BSHD[:, -1:], weight_BSH[:, -1:], keys_BMD
        return keep

    hooks = [block.attention.indexer.register_forward_hook(keeper(layer))
             for layer, block in enumerate(model.blocks) if block.attention.indexer is not None]
    try:
        yield latest
    finally:
        for hook in hooks:
            hook.remove()


def _selected(scorer: Scorer, planted: range, count: int, topk: int) -> int:
    """How many of the planted entries are among the `topk` best of `count` visible ones."""
    if count <= topk:
        return len(planted)  # everything is read
    first_BS = torch.zeros(1, 1, dtype=torch.int64)
    chosen_K = ops.index_topk(*scorer, first_BS, torch.full_like(first_BS, count), topk)[0, 0]
    return int(((chosen_K >= planted.start) & (chosen_K < planted.stop)).sum())
