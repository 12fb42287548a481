"""Balancing routers: the moved bias and the sequence loss, each, both and none (report 2.1, 4.2.2)."""

from fathom.lab.experiment import Experiment, Numbers, Variant, Verdict, harmless, lower, worst

OFF = {"bias": "schedule.bias_speed=0", "loss": "losses.balance=0"}


def _judge(numbers: Numbers) -> Verdict:
    return worst(lower(numbers, "both", "none", "fullest_expert"), harmless(numbers, "both", "none"))


EXPERIMENT = Experiment(
    "balance", "A moved bias and a small sequence loss keep experts evenly used and do not cost quality.", "report 2.1, 4.2.2; DeepSeek-V3",
    "The fullest expert's load over the mean is lower with both than with none by more than the noise, and bits per byte are at most half a "
    "percent (and the noise) higher. Reproduced where both hold, partly where one does.",
    (Variant("both"), Variant("bias alone", (OFF["loss"],)), Variant("loss alone", (OFF["bias"],)), Variant("none", tuple(OFF.values()))),
    _judge, metric="fullest_expert")
