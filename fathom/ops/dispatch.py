"""Operators with one definition and any number of faster implementations.

`@op` turns a plain function (the definition, readable next to its equation) into an operator. Other
implementations register with a predicate on the arguments; the last registered one that supports the
arguments is chosen, else the definition. Nothing here knows any particular operator.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from fathom.ops.precision import narrowed, products_dtype

DEFINITION = "definition"
_preferred: ContextVar[str | None] = ContextVar("fathom_ops_preferred", default=None)


class Op:
    """A callable operator: `definition` plus registered implementations. The definition of a `composed` one calls other operators."""

    def __init__(self, definition: Callable, composed: bool = False):
        self.definition, self.composed = definition, composed
        self.implementations: dict[str, tuple[Callable[..., bool], Callable]] = {}
        self.__name__ = definition.__name__
        self.__doc__ = definition.__doc__

    def register(self, name: str, supports: Callable[..., bool]) -> Callable[[Callable], Callable]:
        """Decorator: add an implementation called `name` for arguments where `supports(*args, **kwargs)`."""

        def add(function: Callable) -> Callable:
            self.implementations[name] = (supports, function)
            return function

        return add

    def choose(self, *args, **kwargs) -> tuple[str, Callable]:
        """The name and function that a call with these arguments would run."""
        preferred = _preferred.get()
        if preferred is not None and (preferred == DEFINITION or self.composed and preferred not in self.implementations):
            return DEFINITION, self.definition  # of a composed one its steps: they may have what is preferred
        for name in (preferred,) if preferred in self.implementations else reversed(self.implementations):
            supports, function = self.implementations[name]
            if supports(*args, **kwargs):
                return name, function
        return DEFINITION, self.definition

    def __call__(self, *args, **kwargs):
        return self.choose(*args, **kwargs)[1](*args, **kwargs)


class Product(Op):
    """An operator of matrix products: inside `products_in` the arguments at the places `narrow` are rounded and the result is float32 again."""

    def __init__(self, definition: Callable, narrow: tuple[int, ...]):
        super().__init__(definition)
        self.narrow = narrow

    def __call__(self, *args, **kwargs):
        dtype = products_dtype()
        if dtype is None or args[0].dtype != torch.float32:
            return self.exactly(*args, **kwargs)
        args = [narrowed(value, dtype) if place in self.narrow else value for place, value in enumerate(args)]
        return self.exactly(*args, **kwargs).float()

    def exactly(self, *args, **kwargs):
        """The result for the arguments as they are."""
        return self.choose(*args, **kwargs)[1](*args, **kwargs)


def op(definition: Callable) -> Op:
    """Decorator: make a definition callable through dispatch."""
    return Op(definition)


def product(*narrow: int) -> Callable[[Callable], Product]:
    """Decorator: as `op`, for matrix products of the arguments at these places."""
    return lambda definition: Product(definition, narrow)


def composed(definition: Callable) -> Op:
    """Decorator: as `op`, for a definition that is made of other operators."""
    return Op(definition, composed=True)


def preferred() -> str | None:
    """The implementation that a surrounding `using` asks for."""
    return _preferred.get()


@contextmanager
def using(name: str) -> Iterator[None]:
    """Prefer the implementation called `name` ("definition" forces the definitions) inside this block."""
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)
