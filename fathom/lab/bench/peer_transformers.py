"""Hugging Face transformers' deepseek_v4 at its best setting: `python -m fathom.lab.bench.peer_transformers JSON`.

Chunks of 512 with its cache, experts as grouped products (for decoding the faster of its two ways), hyper-connections compiled
where this machine can compile; for training AdamW in its fused form.
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from fathom.devices import use_device
from fathom.engine.engine import dtype_of
from fathom.lab.bench.measure import measure, serve
from fathom.lab.bench.plan import Case
from fathom.model.moe import balanced_table

CHUNK = 512
RATE = 1e-4
COMPILED = ("DeepseekV4HyperConnection", "DeepseekV4HyperHead")


class Transformers:
    """Their model with their own random weights, and hash layers that use all experts alike."""

    chunk = CHUNK

    def __init__(self, case: Case):
        torch.manual_seed(case.seed)
        config = transformers.DeepseekV4Config.from_dict(case.config.to_dict())
        self.model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", experts_implementation="grouped_mm").eval()
        shape = case.config.vocab_size, case.config.n_routed_experts, case.config.num_experts_per_tok
        for name, buffer in self.model.named_buffers():
            if name.endswith("tid2eid"):
                buffer.copy_(balanced_table(*shape, torch.Generator().manual_seed(case.seed)))
        self._cast(dtype_of(case.dtype))
        self.model.to(use_device(case.device))
        self.optimizer: torch.optim.Optimizer | None = None
        self.settings = ("grouped_mm", "batched_mm")
        self.facts: dict[str, Any] = {"version": transformers.__version__, "experts": "grouped_mm", "compiled": can_compile()}
        if self.facts["compiled"]:
            for module in self.model.modules():
                if type(module).__name__ in COMPILED:
                    module.compile()

    def _cast(self, dtype: torch.dtype) -> None:
        """As from_pretrained(dtype=...) would; some modules stay float32."""
        wide = self.model._keep_in_fp32_modules_strict
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if tensor.is_floating_point() and not name.endswith("inv_freq") and wide.isdisjoint(name.split(".")):
                tensor.data = tensor.data.to(dtype)

    def use(self, setting: str) -> None:
        """Compute the experts in this way."""
        self.model.set_experts_implementation(setting)
        self.facts["experts"] = setting

    def new_cache(self, batch: int, tokens: int) -> transformers.DynamicCache:
        """An empty cache."""
        return transformers.DynamicCache(config=self.model.config)

    @torch.no_grad()
    def feed(self, cache: transformers.DynamicCache, token_BS: Tensor) -> None:
        """Extend the cache by tokens [B, S] and compute the logits after the last one."""
        self.model(token_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def train(self, token_BS: Tensor) -> None:
        """Loss, gradients, AdamW."""
        if self.optimizer is None:
            self.model.train()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, fused=True)
        self.optimizer.zero_grad(set_to_none=True)
        self.model(token_BS, labels=token_BS, use_cache=False).loss.backward()
        self.optimizer.step()


def can_compile() -> bool:
    """Whether torch.compile works here: a C++ compiler is there, and what it needs."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
    except (TorchDynamoException, OSError, RuntimeError):
        return False
    return True


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    serve(lambda text: measure(Case.from_json(text), Transformers))
