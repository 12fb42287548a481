"""What the attention of a step does, applied to a model from outside: dense, dense with the indexer training alone, sparse (report 4.2.2)."""

from collections.abc import Iterator
from contextlib import contextmanager

from fathom.errors import RecipeError
from fathom.model.indexer import Indexer
from fathom.model.transformer import Transformer
from fathom.optim.schedules import Attention

EVERYTHING = 1 << 62  # entries that an indexer may select, more than there are


def check_phases(model: Transformer, phases: set[Attention]) -> None:
    """RecipeError where the indexer is to learn and the model has none."""
    if "warmup" in phases and not _indexers(model):
        raise RecipeError("indexer_warmup_steps trains the indexer alone, but the model has no layer with an indexer; set it to 0")


@contextmanager
def attending(model: Transformer, attention: Attention) -> Iterator[None]:
    """Inside, for forward and backward: in the warm-up no parameter but the indexers' gets a gradient, and until the indexer selects,
    inference too reads every visible entry.
    """
    frozen = [parameter for name, parameter in model.named_parameters() if ".indexer." not in name] if attention == "warmup" else []
    indexers = _indexers(model) if attention != "sparse" else []
    for parameter in frozen:
        parameter.requires_grad_(False)
    for indexer in indexers:
        indexer.topk = EVERYTHING
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for indexer in indexers:
            indexer.topk = model.config.index_topk


def _indexers(model: Transformer) -> list[Indexer]:
    return [module for module in model.modules() if isinstance(module, Indexer)]
