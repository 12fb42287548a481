"""The generative reward model: the actor itself judges an answer against a rubric, in words (report 5.1.1).

Judging is trained like any other task, on answers whose verdict is known ("judge"). Where no rule scores a task ("judged-math" stands
for such: its rule is hidden from the reward), the verdict is the reward, and its agreement with the hidden truth is reported.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fathom.align.environments.base import SEEDS, Environment, Score, Task, assistant, check_effort, final_text
from fathom.align.rollout import Draw, new_engine, play
from fathom.align.sample import Mode, Rollout, prompt_ids
from fathom.errors import InputError
from fathom.model.transformer import Transformer
from fathom.text.tokenizer import Tokenizer

RUBRIC = "The answer must be right: it is what the question asks for, and nothing else."
TRIES = 20


def judging_messages(question: str, rubric: str, answer: str) -> list[dict]:
    """The prompt of a judgement: the verdict is "yes" or "no", after reasoning where the mode has any."""
    return [{"role": "user", "content": f"Question: {question}\nRubric: {rubric}\nAnswer: {answer}\nDoes the answer meet the rubric? "
             "Say yes or no."}]


def read_verdict(turns: list[dict]) -> bool | None:
    """The verdict of a judgement, None where it is neither yes nor no."""
    text = (final_text(turns) or "").strip().lower().removesuffix(".")
    return {"yes": True, "no": False}.get(text)


class JudgeEnvironment(Environment):
    """Judging answers of another environment, half of them right: the reward is 1 for the true verdict."""

    name = "judge"

    def __init__(self, source: Environment, rubric: str = RUBRIC):
        self.source, self.rubric, self.levels = source, rubric, source.levels

    def make(self, rng: random.Random, level: int) -> tuple[list[dict], dict]:
        """A task of the source with a right answer, or with the right answer of another task that is wrong here."""
        right = rng.random() < 0.5
        task = self.source.task(rng.randrange(SEEDS), "train", level)
        turns = self.source.demonstration(task, "chat")
        worked = self.source.demonstration(task, "high")[-1].get("reasoning_content") or ""
        answer = wanted = turns[-1]["content"]
        for _ in range(0 if right else TRIES):
            other = self.source.demonstration(self.source.task(rng.randrange(SEEDS), "train", level), "chat")
            if self.source.score(task, other).reward < 1:
                answer = other[-1]["content"]
                break
        facts = {"verdict": answer == wanted, "worked": worked, "wanted": wanted, "given": answer}
        return judging_messages(task.question, self.rubric, answer), facts

    def score(self, task: Task, turns: list[dict]) -> Score:
        """1 for the true verdict; anything but yes or no is invalid."""
        verdict = read_verdict(turns)
        return Score(float(verdict == task.facts["verdict"]), verdict is not None, "no verdict" if verdict is None else "a verdict")

    def demonstration(self, task: Task, effort: str) -> list[dict]:
        """The question worked out, compared with the answer, and the verdict."""
        facts = task.facts
        relation = "the same" if facts["verdict"] else "not the same"
        reasoning = f"{facts['worked']} The answer should be {facts['wanted']}. It is {facts['given']}: {relation}."
        return [assistant("yes" if facts["verdict"] else "no", reasoning if check_effort(effort) else None)]


class JudgedEnvironment(Environment):
    """The tasks of another environment, scored by nobody but a judge. `truth` tells what the hidden rule would say."""

    def __init__(self, source: Environment, rubric: str = RUBRIC):
        self.source, self.rubric, self.name, self.levels = source, rubric, f"judged-{source.name}", source.levels

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
        task = Task("judge", rollout.task.split, rollout.task.seed, rollout.task.level,
                    judging_messages(rollout.task.question, environment.rubric, text), {"verdict": True})
        ids = prompt_ids(task, mode.effort, [], tokenizer)
        judgements += [Rollout(task, mode, group, member, [*ids]) for member in range(votes)]
    if judgements:
        engine = new_engine(model, tokenizer, draw, len(judgements))
        play(engine, judgements, {"judge": _Verdicts()}, draw, seed)
        engine.close()
    for group, (rollout, _) in enumerate(answers):
        verdicts = [read_verdict(judgement.turns) for judgement in judgements[group * votes:(group + 1) * votes]]
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


class _Verdicts(JudgeEnvironment):
    """Reads verdicts; makes no tasks."""

    levels = range(1, 2)

    def __init__(self):
        pass

    def make(self, rng: random.Random, level: int) -> tuple[list[dict], dict]:
        raise InputError("verdicts are read only")


def judging_seed(seed: int, number: int) -> int:
    """The seed of a round's judgements, another than that of its rollouts."""
    return int.from_bytes(hashlib.sha256(f"judge/{seed}/{number}".encode()).digest()[:7], "big")
