"""GRPO: groups of answers to one prompt, rewards that a program checks, advantages within the group (report 5.1.1; DeepSeek-V3.2).

A round samples `prompts` groups with the weights of its start; its `updates` learn from a part of the groups each. The steps
are the loop's, with all it guarantees.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console

from fathom import recipe as recipes
from fathom.align.curriculum import choose_tasks
from fathom.align.environments.base import Environment
from fathom.align.judge import judge_rollouts, judging_seed
from fathom.align.losses import Policy, advantages, policy_loss, token_log_probabilities
from fathom.align.rollout import Draw, Play, environments_named, new_rollouts, play_here
from fathom.align.rollout_log import RolloutLog
from fathom.align.round import Rounds, hidden_of_targets, kept_in, observe_policy
from fathom.align.routing import replayed_routing
from fathom.align.sample import Mode, Rollout, Sample, SampleBatch, pack_samples
from fathom.align.tuning import Tune, tuning_optimizer
from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import find_model
from fathom.devices import use_device
from fathom.errors import RecipeError
from fathom.model.transformer import Transformer
from fathom.ops.precision import narrow_dtype, products_in
from fathom.optim.lora import Lora
from fathom.optim.muon import AdamW, Muon
from fathom.optim.schedules import Schedule
from fathom.text.tokenizer import Tokenizer
from fathom.train.loop import Loop, Stage, run_stage
from fathom.train.objective import Losses, LossWeights, auxiliary_losses
from fathom.train.qat import released_numbers
from fathom.train.run_folder import restored, tuned_run


@dataclass(frozen=True)
class Pace:
    """Learning rate and length of on-policy training, in rounds: linear warm-up, constant, cosine decay over the last ones."""

    rounds: int
    updates: int = 2  # of each round's samples, a part of them each
    rate: float = 1e-3
    final_rate: float = 0.0
    warmup_rounds: int = 0
    decay_rounds: int = 0

    def __post_init__(self):
        if self.rounds < 1 or self.updates < 1:
            raise RecipeError(f"pace: rounds is {self.rounds} and updates {self.updates}; allowed: at least 1")
        self.schedule()  # refuses what it cannot follow

    @property
    def steps(self) -> int:
        """Updates in all."""
        return self.rounds * self.updates

    def schedule(self) -> Schedule:
        """The same, in steps."""
        return Schedule(self.steps, 1, lengths=(1,), warmup_steps=self.warmup_rounds * self.updates, peak_rate=self.rate,
                        decay_steps=self.decay_rounds * self.updates, final_rate=self.final_rate)


@dataclass(frozen=True)
class Grpo:
    """A GRPO run from `base`, on tasks of `environments`; several of them make one mixed-reward run.

    `invalid` is what a broken answer or a malformed tool call costs; `deviation_floor` the least deviation that rewards of a group are
    divided by, so that small differences of length do not weigh like right and wrong; `judging` and `votes`: how the actor judges
    answers that no rule scores, and how often each; `quantise` samples and trains with the numbers
    of the official-fp4 export; `tune` as in fine-tuning.
    """

    run: str
    base: str
    environments: tuple[str, ...]
    pace: Pace
    levels: tuple[int, ...] = (1,)
    modes: tuple[Mode, ...] = (Mode(),)
    prompts: int = 16
    group: int = 8
    invalid: float = 0.2
    deviation_floor: float = 0.1
    row_tokens: int = 512
    keep_routing: bool = True
    judging: Mode = Mode("high", 128)
    votes: int = 1
    quantise: bool = False
    tune: Tune = "all"
    seed: int = 0
    draw: Draw = field(default_factory=Draw)
    policy: Policy = field(default_factory=Policy)
    losses: LossWeights = field(default_factory=LossWeights)
    muon: Muon = field(default_factory=Muon)
    adamw: AdamW = field(default_factory=AdamW)
    lora: Lora = field(default_factory=Lora)
    loop: Loop = field(default_factory=Loop)

    def __post_init__(self):
        if not self.environments or not self.modes or self.prompts < 1 or self.group < 2:
            raise RecipeError(f"environments is {list(self.environments)}, prompts {self.prompts}, group {self.group} and modes has "
                              f"{len(self.modes)}; allowed: at least one, at least 1, at least 2, at least one")
        if self.votes < 1:
            raise RecipeError(f"votes is {self.votes}; allowed: at least 1")
        if self.invalid < 0 or self.deviation_floor < 0 or self.row_tokens < 1 or self.draw.temperature == 0:
            raise RecipeError(f"invalid is {self.invalid}, deviation_floor {self.deviation_floor}, row_tokens {self.row_tokens} and "
                              f"draw.temperature {self.draw.temperature}; allowed: from 0, from 0, at least 1, above 0")


def reinforce(recipe: Grpo, known: Mapping[str, Environment], resume: bool, console: Console, play: Play = play_here,
              device: str = "cpu") -> Path:
    """Run a recipe to its end (or continue it) on a device and return the run's folder; `play` plays its rollouts. Raises Stopped after Ctrl-C."""
    on = use_device(device)
    recipe, model, tokenizer, state = tuned_run(recipe, resume)
    reference = load_model(find_model(recipe.base), device=on) if recipe.policy.kl else None
    model.to(on)
    learner = Learner(recipe, model, tokenizer, environments_named(recipe.environments, known), reference, play)
    schedule = recipe.pace.schedule()
    optimizer = tuning_optimizer(model, recipe.tune, recipe.base, recipe.muon, recipe.adamw, recipe.lora, recipe.seed)
    optimizer = restored(optimizer, state)
    stage = Stage(batch=learner.rounds.batch, loss=learner.loss, rate=lambda step: schedule.rate_at(step) * learner.share**0.5,
                  bias_speed=lambda step: 0.0, validate=None, quantised=lambda step: recipe.quantise)
    run_stage(Path(recipe.run), model, tokenizer, optimizer, stage, recipe.pace.steps, state.step if state else 0, recipe.loop, console)
    return Path(recipe.run)


class Learner:
    """Makes the rounds of a run, and the loss of their batches.

    `share` is the part of the last update's groups that had something to teach. The steps of Muon and AdamW are as long for one group as
    for all of them, so the rate falls with the square root of the share, and an update without any changes nothing.
    """

    def __init__(self, recipe: Grpo, model: Transformer, tokenizer: Tokenizer, environments: dict[str, Environment],
                 reference: Transformer | None, play: Play = play_here):
        self.recipe, self.model, self.tokenizer, self.environments, self.reference = recipe, model, tokenizer, environments, reference
        self.play = play
        self.known = min(tokenizer.vocab_size, model.config.vocab_size)
        self.share = 0.0
        self.kept = ExitStack()  # the routing of the last batch, for its backward pass too: that may compute blocks anew
        self.rounds = Rounds(Path(recipe.run), model, recipe.pace.updates, {"recipe": recipe_fingerprint(recipe)}, self.make_round)

    def make_round(self, number: int, log: RolloutLog) -> list[SampleBatch]:
        """Play a round and pack it: one batch for each update."""
        recipe, model = self.recipe, self.model
        self.kept.close()
        tasks = choose_tasks(self.environments, recipe.levels, recipe.modes, recipe.prompts, recipe.seed, number)
        rollouts = new_rollouts(tasks, recipe.group, self.tokenizer)
        with released_numbers(model) if recipe.quantise else nullcontext():
            metrics = self.play(model, self.tokenizer, rollouts, self.environments, recipe.draw, _round_seed(recipe.seed, number), log)
            metrics |= judge_rollouts(model, self.tokenizer, rollouts, self.environments, recipe.judging, recipe.votes, recipe.draw,
                                      judging_seed(recipe.seed, number))
            parts, skipped = samples_of(rollouts, recipe)
            batches = [pack_samples(samples, recipe.row_tokens, self.tokenizer.pad_id).to(model.head.weight.device) for samples in parts]
            for batch, samples in zip(batches, parts, strict=True):
                share = sum(sample.weight > 0 for sample in samples) * recipe.pace.updates / len(rollouts)
                with self._as_in_updates():
                    batch.numbers.update(observe_policy(model, batch, recipe.draw, self.known), share=torch.tensor(min(share, 1.0)))
        for batch in batches:
            if self.reference is not None:
                with self._as_in_updates():
                    batch.numbers["reference_logs_N"] = self._reference_logs(batch)
        metrics |= reward_metrics(rollouts, recipe.invalid) | {"skipped_groups": skipped / len(tasks)}
        return [replace(batch, metrics=metrics) for batch in batches]

    def loss(self, batch: SampleBatch, step: int) -> Losses:
        """The loss of a batch, and numbers for the log."""
        recipe, model = self.recipe, self.model
        batch = batch.to(model.head.weight.device)
        numbers = batch.numbers
        self.kept.close()
        if recipe.keep_routing and "routing" in numbers:
            self.kept.enter_context(replayed_routing(model, [*numbers["routing"]]))
        features = model.features(batch.tokens_BS, batch.positions_BS, [], "sparse")
        logs_N, entropy_N = token_log_probabilities(features.hidden_BSW[batch.learned_BS], model.head.weight[:self.known],
                                                    batch.targets_BS[batch.learned_BS], recipe.draw.temperature, kept_in(batch))
        policy = policy_loss(logs_N, numbers["old_logs_N"], numbers.get("reference_logs_N"), numbers["advantage_U"], numbers["weight_U"],
                             batch.sample_N, recipe.policy)
        auxiliary, more = auxiliary_losses(features.observations, recipe.losses)
        self.share = float(numbers["share"])
        auxiliary = auxiliary * (self.share > 0)
        parts = {"loss": float(policy.total.detach()), "used_share": self.share, "entropy": float(entropy_N.mean())} | policy.parts | batch.metrics
        return Losses(policy.total + auxiliary, parts | {name: float(part.detach()) for name, part in more.items()}, features.observations)

    def _as_in_updates(self) -> AbstractContextManager[None]:
        """Products in the precision of the updates, so that a first update's ratios are 1."""
        return products_in(narrow_dtype(self.recipe.loop.precision, self.model.head.weight.device))

    @torch.no_grad()
    def _reference_logs(self, batch: SampleBatch) -> torch.Tensor:
        return token_log_probabilities(hidden_of_targets(self.reference, batch), self.reference.head.weight[:self.known],
                                       batch.targets_BS[batch.learned_BS], self.recipe.draw.temperature, kept_in(batch))[0]


def samples_of(rollouts: Sequence[Rollout], recipe: Grpo) -> tuple[list[list[Sample]], int]:
    """The samples of each update, a group undivided, and how many groups were skipped for equal rewards.

    An update for which no group is left gets one rollout of weight 0: it learns nothing.
    """
    rewards_PG = torch.tensor([rollout.reward(recipe.invalid) for rollout in rollouts], dtype=torch.float64).view(-1, recipe.group)
    advantages_PG = advantages(rewards_PG, recipe.deviation_floor).float()
    used = [group for group in range(len(rewards_PG)) if bool(advantages_PG[group].any())]
    parts = []
    for part in range(recipe.pace.updates):
        groups = used[part::recipe.pace.updates]
        chosen = [(rollouts[group * recipe.group + member], float(advantages_PG[group, member]))
                  for group in groups for member in range(recipe.group)]
        parts.append([Sample(rollout.tokens, rollout.written, advantage, 1 / len(chosen)) for rollout, advantage in chosen if rollout.count]
                     or [Sample(rollout.tokens, rollout.written, 0.0, 0.0) for rollout in rollouts if rollout.count][:1])
    return parts, len(rewards_PG) - len(used)


def reward_metrics(rollouts: Sequence[Rollout], invalid: float) -> dict[str, float]:
    """Means over rollouts: reward, score (also of each domain and effort), tokens, cut and invalid shares, valid tool calls."""
    calls = sum(rollout.score.calls for rollout in rollouts)
    metrics = {"reward": _mean([rollout.reward(invalid) for rollout in rollouts]),
               "score": _mean([rollout.score.reward for rollout in rollouts]),
               "tokens_per_rollout": _mean([rollout.count for rollout in rollouts]),
               "cut_share": _mean([rollout.finish == "length" for rollout in rollouts]),
               "invalid_share": _mean([rollout.is_invalid for rollout in rollouts])}
    if calls:
        metrics["valid_call_share"] = sum(rollout.score.valid_calls for rollout in rollouts) / calls
    for name in sorted({f"{rollout.task.domain}_{rollout.mode.effort}" for rollout in rollouts}):
        metrics[f"score_{name}"] = _mean([rollout.score.reward for rollout in rollouts
                                          if f"{rollout.task.domain}_{rollout.mode.effort}" == name])
    return metrics


def recipe_fingerprint(recipe: object) -> str:
    """A hash of a resolved recipe."""
    return hashlib.sha256(recipes.dump(recipe).encode()).hexdigest()[:16]


def _round_seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:7], "big")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
