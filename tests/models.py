"""Small models with weights that exercise every path: large enough logits, moved biases, uneven hyper-connections."""

import torch

from fathom.config import ModelConfig
from fathom.model.transformer import Transformer


def small_config(ratios, **changes) -> ModelConfig:
    """A config of about 100k parameters with one layer per ratio, YaRN on, and many index heads: scores never tie."""
    base = dict(
        vocab_size=300, hidden_size=64, num_hidden_layers=len(ratios), num_attention_heads=4, head_dim=32,
        qk_rope_head_dim=16, q_lora_rank=32, o_groups=2, o_lora_rank=16, n_routed_experts=8, num_experts_per_tok=3,
        moe_intermediate_size=32, index_n_heads=32, index_head_dim=16, index_topk=12, num_hash_layers=1,
        sliding_window=128, compress_ratios=[*ratios, 0], max_position_embeddings=4096,
        rope_scaling={"original_max_position_embeddings": 256, "factor": 16}, torch_dtype="float32")
    return ModelConfig.from_dict(base | changes)


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model in eval mode whose every parameter and bias is random."""
    model = Transformer(config).initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            if parameter.dim() >= 2 and "fn" not in name:
                parameter.copy_(noise * 0.12)
            elif name.endswith(("scale", "base")) or "position_bias" in name:
                parameter.copy_(noise * 0.7)
            elif parameter.dim() == 1:
                parameter.add_(noise * 0.3)
            else:
                parameter.copy_(noise * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.normal_(0, 0.2, generator=generator)
    return model.eval()


def random_tokens(config: ModelConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids of the given shape."""
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
