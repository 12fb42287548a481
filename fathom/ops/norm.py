"""RMS normalisation, of the model's inputs and of each head's queries (report 2.3.3)."""

import torch.nn.functional as F
from torch import Tensor

from fathom.ops.dispatch import op
from fathom.ops.precision import wide


@op
def rms_normalise(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x [..., D] divided by its root mean square and, if given, times a weight [D]; computed in float32, in the dtype of x."""
    weight = None if weight is None else wide(weight)
    return F.rms_norm(wide(x), x.shape[-1:], weight, eps).to(x.dtype)
