"""All kernels: importing this registers them."""

import fathom.ops.triton.attention
import fathom.ops.triton.compress
import fathom.ops.triton.entry_mass
import fathom.ops.triton.experts
import fathom.ops.triton.index_objective
import fathom.ops.triton.index_topk
import fathom.ops.triton.linear
import fathom.ops.triton.losses
import fathom.ops.triton.norm_rotary
import fathom.ops.triton.orthogonalize
import fathom.ops.triton.rounding
import fathom.ops.triton.streams  # noqa: F401
