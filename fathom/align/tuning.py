"""What post-training tunes: all weights, those of the routed experts, or low-rank additions, each with its optimiser."""

from typing import Literal

from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import find_model
from fathom.model.transformer import Transformer
from fathom.optim.lora import Lora, LoraOptimizer
from fathom.optim.muon import AdamW, Muon, Optimizer

Tune = Literal["all", "experts", "lora"]


def tuning_optimizer(model: Transformer, tune: Tune, base: str, muon: Muon, adamw: AdamW, lora: Lora, seed: int) -> Optimizer | LoraOptimizer:
    """An optimiser of what is tuned; the rest of the model is frozen. `base` is the model that low-rank additions are added to."""
    if tune == "lora":
        return LoraOptimizer(model, dict(load_model(find_model(base)).named_parameters()), lora, adamw, seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tune == "all" or ".experts." in name)
    tuned = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return Optimizer(tuned, model.config, muon, adamw)
