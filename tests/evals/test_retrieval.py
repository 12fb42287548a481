"""Needle retrieval: texts as asked for, both measures right on models whose answers are known, and the command."""

import json
import random
from types import SimpleNamespace

import pytest
import torch

from fathom.checkpoint.released import save_model
from fathom.data.recall import recall_document
from fathom.errors import InputError
from fathom.evals import retrieval
from fathom.evals.retrieval import Case, Needles, make_case, score
from fathom.text.tokenizer import Tokenizer
from tests.models import random_model, small_config
from tests.runs import fathom


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(1)
    return Tokenizer.train([recall_document(rng, 3000) for _ in range(20)], 600)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_text_has_its_length_its_facts_and_the_needle_at_its_depth(tokenizer, depth):
    case = make_case(tokenizer, 1500, depth, 4, random.Random(5))
    assert 1500 - 60 < len(case.prompt) <= 1500 and case.prompt[0] == tokenizer.bos_id
    text = tokenizer.decode(case.prompt[1:])
    values = [tokenizer.decode(answer).strip(" .") for answer in case.answers]
    key = text.rsplit("What is the code of the ", 1)[1].removesuffix("? Answer:")
    statement = f"The code of the {key} is {values[0]}."
    assert text.count("The code of the ") == 4 and all(text.count(f"is {value}.") == 1 for value in values)
    others = sum(len(f" The code of the {key} is 12345.") for _ in range(3))
    assert abs(text.index(statement) / len(text) - depth) < 0.1 + others / len(text)
    assert make_case(tokenizer, 1500, depth, 4, random.Random(5)) == case != make_case(tokenizer, 1500, depth, 4, random.Random(6))


class Recites:
    """A model that continues a known sequence, with `sure` as the logit of the right token."""

    def __init__(self, sequence, sure):
        self.sequence, self.sure = sequence, sure

    def new_cache(self, rows, tokens):
        return SimpleNamespace(seen=0)

    def __call__(self, ids, cache, last_only=False):
        logits_BSV = torch.zeros(1, ids.shape[1], 50)
        for at in range(ids.shape[1]):
            logits_BSV[0, at, self.sequence[min(cache.seen + at + 1, len(self.sequence) - 1)]] = self.sure
        cache.seen += ids.shape[1]
        return SimpleNamespace(logits=logits_BSV[:, -1:] if last_only else logits_BSV)


@pytest.mark.parametrize("answer, expected", [([5, 6, 7], (True, True)), ([8, 9, 7], (False, False)), ([5, 6, 3], (False, True))])
def test_a_model_is_judged_by_what_it_would_say(monkeypatch, answer, expected):
    monkeypatch.setattr(retrieval, "CHUNK", 4)
    prompt = [1, *range(10, 20)]
    case = Case(prompt, [[5, 6, 7], [8, 9, 7]])
    assert score(Recites([*prompt, *answer], 9.0), case) == expected


def test_the_scores_of_a_real_model_are_those_of_one_pass(tokenizer):
    model = random_model(small_config([0, 4, 128], vocab_size=600))
    case = make_case(tokenizer, 300, 0.5, 3, random.Random(2))
    totals, exact = [], []
    with torch.no_grad():
        for answer in case.answers:
            logits_V = model(torch.tensor([case.prompt + answer])).logits[0, len(case.prompt) - 1:-1]
            totals.append(logits_V.log_softmax(-1)[range(len(answer)), answer].sum().item())
            exact.append(logits_V.argmax(-1).tolist() == answer)
    cache = model.new_cache(1, 400)
    with torch.inference_mode():
        last_V = model(torch.tensor([case.prompt]), cache=cache, last_only=True).logits[0, -1]
        found = retrieval._answer(model, cache, last_V, case.answers[0])
    assert found[0] == pytest.approx(totals[0], abs=1e-3) and found[1] == exact[0]
    assert score(model, case) == (exact[0], totals[0] > max(totals[1:]))


def test_the_command_prints_a_table_and_keeps_it(tokenizer, tmp_path):
    model = random_model(small_config([4, 0], vocab_size=600))
    save_model(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    result = fathom("eval", tmp_path / "model", "--needles", "--lengths", "128,256", timeout=300)
    assert result.returncode == 0, result.stderr
    kept = json.loads((tmp_path / "model" / "needles.json").read_text())
    assert kept["lengths"] == [128, 256] and [len(row) for row in kept["cells"]] == [5, 5] and "100%" in result.stdout
    result = fathom("eval", tmp_path / "model", "--needles", "--lengths", "128,9000", timeout=300)
    assert result.returncode == 2 and "longer than this model reads" in result.stderr


@pytest.mark.parametrize("change", [dict(lengths=(64,)), dict(depths=(2.0,)), dict(facts=1), dict(repeats=0)])
def test_impossible_questions_are_refused(change):
    with pytest.raises(InputError, match="allowed"):
        Needles(**change)


def test_lengths_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="write it as 512,1024"):
        Needles.of_lengths("long")
