"""The generative reward model: rewards that only a judge gives, and how far it agrees with the hidden truth."""

import pytest

from fathom.align import judge as judging
from fathom.align.domains import Domains
from fathom.align.environments.base import assistant, final_text
from fathom.align.grpo import Grpo, Learner, Pace
from fathom.align.judge import JudgedEnvironment, judge_rollouts, reveal_truth
from fathom.align.rollout import Draw, new_rollouts
from fathom.align.rollout_log import RolloutLog
from fathom.align.sample import Mode
from fathom.checkpoint.released import load_model
from fathom.text.tokenizer import Tokenizer
from tests.align.toy import TOYS, micro_folder

JUDGED = Domains()["judged-math"]


def rollouts_with(answers, tokenizer):
    rollouts = new_rollouts([(JUDGED.task(seed), Mode("chat", 8)) for seed in range(len(answers))], 1, tokenizer)
    for rollout, answer in zip(rollouts, answers, strict=True):
        rollout.turns = [assistant(JUDGED.demonstration(rollout.task, "chat")[0]["content"] if answer is True else answer)]
        rollout.score, rollout.finish = JUDGED.score(rollout.task, rollout.turns), "stop"
    return rollouts


def test_verdicts_become_rewards_and_agreement_with_the_truth_is_reported(monkeypatch, tmp_path):
    folder = micro_folder(tmp_path / "model")
    model, tokenizer = load_model(folder), Tokenizer.load(folder)

    def play(engine, judgements, environments, draw, seed):
        for judgement in judgements:  # a judge that says yes to all, of two votes; without a verdict on the third answer
            judgement.turns = [assistant("hm" if judgement.group == 2 and judgement.member else "yes")]
            judgement.score = environments["judging"].score(judgement.task, judgement.turns)

    monkeypatch.setattr(judging, "play", play)
    rollouts = rollouts_with([True, "wrong", "wrong", ""], tokenizer)
    metrics = judge_rollouts(model, tokenizer, rollouts, {"judged-math": JUDGED}, Mode("high", 16), 2, Draw(cache_mib=16), 0)
    assert [rollout.score.reward for rollout in rollouts] == [1.0, 1.0, 0.5, 0.0]
    assert metrics == {"judge_agreement": 0.75, "judged_truth": 0.25, "judge_invalid_share": pytest.approx(1 / 6)}
    assert not rollouts[3].score.valid and final_text(rollouts[3].turns) is None
    reveal_truth(rollouts, {"judged-math": JUDGED})
    assert [rollout.score.reward for rollout in rollouts] == [1.0, 0.0, 0.0, 0.0]
    assert judge_rollouts(model, tokenizer, [], {}, Mode(), 1, Draw(), 0) == {}


def test_a_round_is_judged_by_the_model_that_plays_it(tmp_path):
    folder = micro_folder(tmp_path / "model")
    recipe = Grpo(run=str(tmp_path / "run"), base=str(folder), environments=("judged-letters", "judging"), pace=Pace(1, 1, 0.01), prompts=4, group=2,
                  modes=(Mode("chat", 6),), judging=Mode("chat", 4), draw=Draw(cache_mib=16))
    environments = {"judged-letters": JudgedEnvironment(TOYS["letters"]), "judging": Domains()["judging"]}
    learner = Learner(recipe, load_model(folder), Tokenizer.load(folder), environments, None)
    first, again = (learner.make_round(0, RolloutLog(tmp_path / name, {})) for name in ("one", "two"))
    assert {"judge_agreement", "judged_truth", "judge_invalid_share", "score_judging_chat"} <= set(first[0].metrics)
    assert first[0].metrics["judge_agreement"] == again[0].metrics["judge_agreement"]
