"""The operators: everything heavy that the layers above may call, each a definition behind dispatch."""

from importlib.util import find_spec

import torch

import fathom.ops.cpu.attention
import fathom.ops.cpu.experts
import fathom.ops.cpu.grouped_attention
import fathom.ops.cpu.index_objective
import fathom.ops.cpu.index_topk
import fathom.ops.cpu.linear
import fathom.ops.cpu.losses
import fathom.ops.cpu.orthogonalize
import fathom.ops.cpu.selected_attention
import fathom.ops.cpu.streams
import fathom.ops.native.attention
import fathom.ops.native.compress
import fathom.ops.native.experts
import fathom.ops.native.heads
import fathom.ops.native.index_objective
import fathom.ops.native.index_topk
import fathom.ops.native.linear
import fathom.ops.native.norm
import fathom.ops.native.orthogonalize
import fathom.ops.native.records
import fathom.ops.native.rotary
import fathom.ops.native.routing
import fathom.ops.native.streams
from fathom.ops.attention import (
    Entries,
    Window,
    attended_entries,
    attention,
    entry_mass,
    visible_entries,
)
from fathom.ops.compress import compressor_inputs, pool_blocks
from fathom.ops.dispatch import using
from fathom.ops.experts import clamped_swiglu, routed_experts, swiglu_expert
from fathom.ops.grouped_attention import grouped_attention, key_mass
from fathom.ops.heads import index_queries, join_heads, low_rank_queries, shared_key
from fathom.ops.index_objective import index_objective
from fathom.ops.index_topk import index_scores, index_topk
from fathom.ops.linear import Matrix, Norm, Projection, dense, grouped_linear, linear
from fathom.ops.losses import IGNORE, cross_entropy, index_divergence, reverse_kl, sequence_balance
from fathom.ops.norm import rms_normalise
from fathom.ops.orthogonalize import orthogonalize
from fathom.ops.precision import products_in, wide
from fathom.ops.records import Recorded, pack, unpack
from fathom.ops.rotary import rotate
from fathom.ops.rounding import EXACT, Rounding, round_entries, round_index, round_inputs
from fathom.ops.routing import route
from fathom.ops.streams import collapse_coefficients, open_streams, sinkhorn, stream_coefficients, streams_in, streams_out

if torch.cuda.is_available() and find_spec("triton"):
    import fathom.ops.triton.kernels  # noqa: F401  (registers them)

__all__ = [
    "EXACT", "IGNORE", "Entries", "Matrix", "Norm", "Projection", "Recorded", "Rounding", "Window", "attended_entries", "attention", "clamped_swiglu",
    "collapse_coefficients", "compressor_inputs", "cross_entropy", "dense", "entry_mass", "grouped_attention", "grouped_linear",
    "index_divergence", "index_objective", "index_queries", "index_scores", "index_topk", "join_heads", "key_mass", "linear", "low_rank_queries",
    "open_streams", "orthogonalize", "pack", "pool_blocks", "reverse_kl", "rms_normalise", "rotate", "round_entries", "round_index",
    "round_inputs", "route", "routed_experts", "sequence_balance", "shared_key", "sinkhorn", "stream_coefficients", "streams_in", "streams_out",
    "swiglu_expert", "unpack", "using", "visible_entries", "wide",
]
