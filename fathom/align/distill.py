"""On-policy distillation: many teachers become one student, on the student's own samples (report 5.1.2, 5.2.2).

Every sample is scored by the teacher of its domain, over the whole vocabulary. A round stores the teachers' last hidden states on disk;
an update rebuilds their logits through their heads, its samples ordered by teacher, one head in memory at a time.
"""

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from fathom.align.curriculum import choose_tasks
from fathom.align.environments.base import Environment
from fathom.align.grpo import Pace, recipe_fingerprint, reward_metrics
from fathom.align.rollout import Draw, Play, environments_named, new_rollouts, play_here
from fathom.align.rollout_log import RolloutLog
from fathom.align.round import Rounds, hidden_of_targets
from fathom.align.sample import Mode, Rollout, Sample, SampleBatch, join_batches, pack_samples
from fathom.checkpoint.names import released_name
from fathom.checkpoint.released import load_model, save_model
from fathom.checkpoint.training import find_model
from fathom.checkpoint.weights import Weights
from fathom.devices import use_device
from fathom.errors import CheckpointError, RecipeError
from fathom.model.transformer import Transformer
from fathom.ops import dense, reverse_kl
from fathom.optim.muon import AdamW, Muon, Optimizer
from fathom.text.tokenizer import Tokenizer
from fathom.train.loop import Loop, Stage, run_stage
from fathom.train.objective import Losses, LossWeights, auxiliary_losses
from fathom.train.qat import released_numbers
from fathom.train.run_folder import restored, tuned_run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Teacher:
    """A specialist, the environments whose samples it judges, the weight of its divergence, and its environments' share of the prompts."""

    run: str
    environments: tuple[str, ...]
    weight: float = 1.0
    share: int = 1

    def __post_init__(self):
        if not self.environments or self.weight <= 0 or self.share < 1:
            raise RecipeError(f"teacher {self.run}: weight is {self.weight}, share {self.share}, environments {list(self.environments)}; "
                              "allowed: above 0, at least 1, one or more")


@dataclass(frozen=True)
class Distill:
    """A distillation run that starts from `base`. `samples`: whose answers are learned from, "student" (the report's way) or "teachers"
    (off-policy, for comparison). `hidden`: the dtype in which teachers' hidden states are stored. `quantise`: as in GRPO.
    """

    run: str
    base: str
    teachers: tuple[Teacher, ...]
    pace: Pace
    levels: tuple[int, ...] = (1,)
    modes: tuple[Mode, ...] = (Mode(),)
    prompts: int = 64
    row_tokens: int = 512
    samples: Literal["student", "teachers"] = "student"
    hidden: Literal["float32", "bfloat16"] = "float32"
    quantise: bool = False
    seed: int = 0
    draw: Draw = field(default_factory=Draw)
    losses: LossWeights = field(default_factory=LossWeights)
    muon: Muon = field(default_factory=Muon)
    adamw: AdamW = field(default_factory=AdamW)
    loop: Loop = field(default_factory=Loop)

    def __post_init__(self):
        names = [name for teacher in self.teachers for name in teacher.environments]
        if not self.teachers or len({*names}) < len(names):
            raise RecipeError(f"teachers: every environment needs one teacher, and one only; found {', '.join(names) or 'none'}")
        if not self.modes or self.prompts < 1 or self.row_tokens < 1:
            raise RecipeError(f"prompts is {self.prompts}, row_tokens {self.row_tokens} and modes has {len(self.modes)}; allowed: at least 1")


def distill(recipe: Distill, known: Mapping[str, Environment], resume: bool, console: Console, play: Play = play_here,
            device: str = "cpu") -> Path:
    """Run a recipe to its end (or continue it) on a device and return the run's folder; `play` plays the student's rollouts. Raises Stopped after
    Ctrl-C.
    """
    on = use_device(device)
    recipe, model, tokenizer, state = tuned_run(recipe, resume)
    for teacher in recipe.teachers:
        if Tokenizer.load(find_model(teacher.run)).fingerprint != tokenizer.fingerprint:
            raise RecipeError(f"{teacher.run} has another tokenizer than {recipe.base}; teachers and student must share theirs")
    model.to(on)
    environments = environments_named([name for teacher in recipe.teachers for name in teacher.environments], known)
    pupil, schedule = Pupil(recipe, model, tokenizer, environments, play), recipe.pace.schedule()
    optimizer = restored(Optimizer(model.named_parameters(), model.config, recipe.muon, recipe.adamw), state)
    stage = Stage(batch=pupil.rounds.batch, loss=pupil.loss, rate=schedule.rate_at, bias_speed=lambda step: 0.0, validate=None,
                  quantised=lambda step: recipe.quantise)
    run_stage(Path(recipe.run), model, tokenizer, optimizer, stage, recipe.pace.steps, state.step if state else 0, recipe.loop, console)
    return Path(recipe.run)


class Pupil:
    """Makes the rounds of a distillation, and the loss of their batches."""

    def __init__(self, recipe: Distill, model: Transformer, tokenizer: Tokenizer, environments: dict[str, Environment],
                 play: Play = play_here):
        self.recipe, self.model, self.tokenizer, self.environments, self.play = recipe, model, tokenizer, environments, play
        self.known, self.device = min(tokenizer.vocab_size, model.config.vocab_size), model.head.weight.device
        self.teacher_of = {name: number for number, teacher in enumerate(recipe.teachers) for name in teacher.environments}
        self.rounds = Rounds(Path(recipe.run), model, recipe.pace.updates, {"recipe": recipe_fingerprint(recipe)}, self.make_round)
        self._head: tuple[int, Tensor] | None = None

    def make_round(self, number: int, log: RolloutLog) -> list[SampleBatch]:
        """Sample a round, and let the teachers read it: one batch for each update, ordered by teacher."""
        recipe = self.recipe
        shares = {name: recipe.teachers[teacher].share for name, teacher in self.teacher_of.items()}
        tasks = choose_tasks(self.environments, recipe.levels, recipe.modes, recipe.prompts, recipe.seed, number, shares=shares)
        rollouts = new_rollouts(tasks, 1, self.tokenizer)
        metrics = self._play(rollouts, number, log) | reward_metrics(rollouts, 0.0)
        longest = max([recipe.row_tokens, *(len(rollout.tokens) for rollout in rollouts)])
        batches: list[list[SampleBatch]] = [[] for _ in range(recipe.pace.updates)]
        hidden: list[list[Tensor]] = [[] for _ in range(recipe.pace.updates)]
        for teacher in range(len(recipe.teachers)):
            own = [rollout for rollout in rollouts if self.teacher_of[rollout.task.domain] == teacher and rollout.count]
            reader = load_model(find_model(recipe.teachers[teacher].run), device=self.device)
            for part in range(recipe.pace.updates):
                samples = [Sample(rollout.tokens, rollout.written, teacher=teacher) for rollout in own[part::recipe.pace.updates]]
                if samples:
                    batches[part].append(pack_samples(samples, longest, self.tokenizer.pad_id).to(self.device))
                    with torch.no_grad():
                        hidden[part].append(hidden_of_targets(reader, batches[part][-1]).to(DTYPES[recipe.hidden]))
        if not all(batches):
            raise RecipeError(f"a round of {recipe.prompts} prompts leaves an update without samples; raise prompts")
        return [replace(batch, metrics=metrics, numbers=batch.numbers | {
                    f"hidden_{int(one.numbers['teacher_U'][0])}": hidden_NW for one, hidden_NW in zip(ones, states, strict=True)})
                for ones, states in zip(batches, hidden, strict=True) for batch in [join_batches(ones)]]

    def loss(self, batch: SampleBatch, step: int) -> Losses:
        """sum_i w_i mean KL(student || teacher_i) / sum_i w_i over the teachers of the batch, and numbers for the log."""
        batch = batch.to(self.device)
        features = self.model.features(batch.tokens_BS, batch.positions_BS, [], "sparse")
        hidden_NW, teacher_N = features.hidden_BSW[batch.learned_BS], batch.numbers["teacher_U"][batch.sample_N]
        total, weights, parts = 0.0, 0.0, {}
        for number in teacher_N.unique().tolist():
            teacher = self.recipe.teachers[number]
            divergence_n = reverse_kl(hidden_NW[teacher_N == number], self.model.head.weight[:self.known],
                                      batch.numbers[f"hidden_{number}"].float(), self._head_of(number)[:self.known])
            total, weights = total + teacher.weight * divergence_n.mean(), weights + teacher.weight
            parts[f"kl_{'_'.join(teacher.environments)}"] = float(divergence_n.mean().detach())
        total = total / weights
        auxiliary, more = auxiliary_losses(features.observations, self.recipe.losses)
        parts = {"loss": float(total.detach())} | parts | batch.metrics
        return Losses(total + auxiliary, parts | {name: float(part.detach()) for name, part in more.items()}, features.observations)

    def _play(self, rollouts: list[Rollout], number: int, log: RolloutLog) -> dict[str, float]:
        recipe = self.recipe
        seed = int.from_bytes(hashlib.sha256(f"{recipe.seed}/{number}".encode()).digest()[:7], "big")
        if recipe.samples == "student":
            with released_numbers(self.model) if recipe.quantise else nullcontext():
                return self.play(self.model, self.tokenizer, rollouts, self.environments, recipe.draw, seed, log)
        metrics = {}
        for teacher, settings in enumerate(recipe.teachers):
            own = [rollout for rollout in rollouts if self.teacher_of[rollout.task.domain] == teacher]
            if own:
                model = load_model(find_model(settings.run), device=self.device)
                own_log = RolloutLog(log.path.with_suffix(f".teacher-{teacher}.log"), log.head)
                metrics = play_here(model, self.tokenizer, own, self.environments, recipe.draw, seed, own_log)
                own_log.seal()
        return metrics

    def _head_of(self, teacher: int) -> Tensor:
        """A teacher's head [V, W]; only the last one asked for is kept."""
        if self._head is None or self._head[0] != teacher:
            weights = Weights(find_model(self.recipe.teachers[teacher].run))
            self._head = teacher, dense(weights.read(released_name("head.weight")), torch.float32).to(self.device)
        return self._head[1]


@torch.no_grad()
def average(paths: list[str], out: Path) -> Path:
    """The mean of the weights of several models of one shape, as a model folder: the baseline that distillation replaces.

    CheckpointError where their shapes, tokenizers or routing tables differ.
    """
    folders = [find_model(path) for path in paths]
    mean, tokenizer = load_model(folders[0]), Tokenizer.load(folders[0])
    state = mean.state_dict()
    for folder in folders[1:]:
        other = load_model(folder)
        if other.config != mean.config or Tokenizer.load(folder).fingerprint != tokenizer.fingerprint:
            raise CheckpointError(f"{folder} has another shape or tokenizer than {folders[0]}; they cannot be averaged")
        for name, tensor in other.state_dict().items():
            if tensor.is_floating_point():
                state[name] += tensor
            elif not torch.equal(tensor, state[name]):
                raise CheckpointError(f"{folder} routes by another table than {folders[0]} ({name}); they cannot be averaged")
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor /= len(folders)
    save_model(mean, out)
    tokenizer.save(out)
    return out
