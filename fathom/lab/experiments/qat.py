"""FP4 experts: trained with, or rounded to after training (report 5.2.1)."""

import torch

from fathom.evals.perplexity import bits_per_byte
from fathom.lab.experiment import Experiment, Trained, Variant, lower
from fathom.train.qat import released_numbers


@torch.no_grad()
def _measure(trained: Trained) -> dict[str, float]:
    exact = bits_per_byte(trained.model, trained.held_out, trained.byte_lengths_V)
    with released_numbers(trained.model):
        return {"bits_exact": exact, "bits_released": bits_per_byte(trained.model, trained.held_out, trained.byte_lengths_V)}


EXPERIMENT = Experiment(
    "qat", "Training with FP4 experts makes the FP4 model better than rounding a finished one.", "report 5.2.1",
    "Bits per byte of the model in its released numbers (FP4 experts, FP8 products) are lower by more than the noise where the last quarter "
    "of the steps was quantisation-aware than where the finished weights are rounded.",
    (Variant("aware", ("schedule.quantise_from=225",)), Variant("rounded after")),
    lambda numbers: lower(numbers, "aware", "rounded after", "bits_released"), _measure, metric="bits_released")
