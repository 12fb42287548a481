"""Predicting one token further: does it help the next token, and how often is the draft right (report 2.1, 4.2.2)?"""

import torch

from fathom import ops
from fathom.lab.experiment import Experiment, Numbers, Trained, Variant, Verdict, lower, mean

PUBLISHED = 0.85  # the lower end of DeepSeek-V3's acceptance


@torch.no_grad()
def _measure(trained: Trained) -> dict[str, float]:
    """How often the MTP block's best token is the model's own best one, on held-out text."""
    same = count = 0
    for batch in trained.held_out:
        best_BS = trained.model(batch.tokens_BS, position_BS=batch.positions_BS).logits.argmax(-1)[:, 1:]
        draft_BS = trained.model.mtp_logits(batch.tokens_BS, batch.positions_BS).argmax(-1)
        real_BS = (batch.targets_BS[:, 1:] != ops.IGNORE) & (batch.positions_BS[:, 1:] > 0)
        same, count = same + int((best_BS == draft_BS)[real_BS].sum()), count + int(real_BS.sum())
    return {"acceptance": same / count}


def _judge(numbers: Numbers) -> Verdict:
    better, accepted = lower(numbers, "MTP", "without"), mean(numbers, "MTP", "acceptance")
    holds = accepted >= PUBLISHED
    outcome = "reproduced" if better.outcome == "reproduced" and holds else "not" if better.outcome == "not" and not holds else "partly"
    return Verdict(outcome, f"{better.ours}; the draft is the model's own choice in {accepted:.0%} of the positions (DeepSeek-V3: 85 to 90%)")


EXPERIMENT = Experiment(
    "mtp", "Multi-token prediction improves the model, and its drafts are accepted 85 to 90% of the time.", "report 2.1; DeepSeek-V3 5.4.3",
    "Bits per byte with MTP are below those without by more than the noise, and at least 85% of the drafts are the model's own greedy choice. "
    "Reproduced where both hold, not where neither does.",
    (Variant("MTP"), Variant("without", ("schedule.mtp_weight=0", "schedule.mtp_weight_decayed=0"))), _judge, _measure)
