"""Quantisation-aware training: forward and backward see the released number formats, the optimiser full precision (report 5.2.1).

The weights that a step multiplies with are the ones an official-fp4 export would hold: experts in FP4, other products in FP8, the rest in
BF16 or float32. Their gradients go straight to the float32 masters, which are all that checkpoints keep.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from fathom.checkpoint.layouts import Layout, quantised_in, rounded_weights, use_rounding
from fathom.model.transformer import Transformer
from fathom.ops.rounding import EXACT, ReleasedRounding

LAYOUT: Layout = "official-fp4"


@contextmanager
def released_numbers(model: Transformer) -> Iterator[None]:
    """Inside, the model computes what its export computes; on leaving it has its own weights back, with the gradients made inside."""
    quantised = quantised_in(model, LAYOUT)
    rounded = rounded_weights(model, LAYOUT)
    masters = {name: parameter.data for name, parameter in model.named_parameters()}
    use_rounding(model, ReleasedRounding(model.config.qk_rope_head_dim), quantised)
    try:
        for name, parameter in model.named_parameters():
            parameter.data = rounded[name]
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = masters[name]
        use_rounding(model, EXACT, quantised)
