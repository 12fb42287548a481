"""The generative reward model: the actor itself judges an answer against a rubric, in words (report 5.1.1).

Judging is trained like any other task, on answers whose verdict is known (environments/judging.py). Where no rule scores a task
("judged-math" stands for such: its rule is hidden from the reward), the verdict is the reward, and its agreement with the hidden
truth is reported.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fathom.align.environments.base import Environment, Score, Task, final_text
from fathom.align.environments.judging import RUBRICS, JudgingEnvironment, judge_messages, verdict_of
from fathom.align.rollout import Draw, new_engine, play
from fathom.align.sample import Mode, Rollout, prompt_ids
from fathom.model.transformer import Transformer
from fathom.text.tokenizer import Tokenizer

RUBRIC = "The answer is right."


class JudgedEnvironment(Environment):
    """The tasks of another environment, scored by nobody but a judge. `truth` tells what the hidden rule would say."""

    def __init__(self, source: Environment, rubric: str | None = None):
        self.source, self.name, self.levels = source, f"judged-{source.name}", source.levels
        self.rubric = rubric or RUBRICS.get(source.name, RUBRIC)

    def make(self, rng: random.Random, level: int) -> tuple[list[dict], dict]:
        """A task of the source."""
        return self.source.make(rng, level)

    def step(self, task: Task, turns: list[dict]) -> list[dict] | None:
        """As in the source."""
        return self.source.step(task, turns)

    def score(self, task: Task, turns: list[dict]) -> Score:
        """Whether the answer can be judged at all; the reward is the judge's to give."""
        return Score(0.0, final_text(turns) is not None, "to be judged")

    def truth(self, task: Task, turns: list[dict]) -> float:
        """The reward that the hidden rule would give; for reports only."""
        return self.source.score(task, turns).reward

    def demonstration(self, task: Task, effort: str) -> list[dict]:
        """As in the source."""
        return self.source.demonstration(task, effort)

    def careless(self, task: Task, effort: str) -> list[dict]:
        """As in the source."""
        return self.source.careless(task, effort)


def judge_rollouts(model: Transformer, tokenizer: Tokenizer, rollouts: Sequence[Rollout], environments: Mapping[str, Environment], mode: Mode,
                   votes: int, draw: Draw, seed: int) -> dict[str, float]:
    """Give every rollout of a judged environment the share of `votes` for yes as its reward; the model judges as it is now.

    Returns how many judgements were no verdict, and how often the majority agreed with the hidden truth; {} where nothing is to be judged.
    """
    judged = [rollout for rollout in rollouts if isinstance(environments[rollout.task.domain], JudgedEnvironment)]
    answers = [(rollout, text) for rollout in judged if (text := final_text(rollout.turns)) is not None]
    if not judged:
        return {}
    judgements = []
    for group, (rollout, text) in enumerate(answers):
        environment = environments[rollout.task.domain]
        task = Task("judging", rollout.task.split, rollout.task.seed, rollout.task.level,
                    judge_messages(rollout.task.question, text, environment.rubric), {"met": True})
        ids = prompt_ids(task, mode.effort, [], tokenizer)
        judgements += [Rollout(task, mode, group, member, [*ids]) for member in range(votes)]
    if judgements:
        engine = new_engine(model, tokenizer, draw, len(judgements))
        play(engine, judgements, {"judging": JudgingEnvironment()}, draw, seed)
        engine.close()
    for group, (rollout, _) in enumerate(answers):
        verdicts = [verdict_of(judgement.turns) for judgement in judgements[group * votes:(group + 1) * votes]]
        rollout.score = replace(rollout.score, reward=sum(verdict is True for verdict in verdicts) / votes, reason="judged")
    truths = [environments[rollout.task.domain].truth(rollout.task, rollout.turns) for rollout in judged]
    agreements = [(rollout.score.reward > 0.5) == (truth >= 1) for rollout, truth in zip(judged, truths, strict=True)]
    return {"judge_agreement": sum(agreements) / len(judged), "judged_truth": sum(truths) / len(judged),
            "judge_invalid_share": sum(not judgement.score.valid for judgement in judgements) / max(len(judgements), 1)}


def reveal_truth(rollouts: Sequence[Rollout], environments: Mapping[str, Environment]) -> None:
    """Score judged tasks by their hidden rule instead, for measurements."""
    for rollout in rollouts:
        environment = environments[rollout.task.domain]
        if isinstance(environment, JudgedEnvironment):
            rollout.score = replace(rollout.score, reward=environment.truth(rollout.task, rollout.turns), reason="the hidden rule")


def judging_seed(seed: int, number: int) -> int:
    """The seed of a round's judgements, another than that of its rollouts."""
    return int.from_bytes(hashlib.sha256(f"judge/{seed}/{number}".encode()).digest()[:7], "big")
