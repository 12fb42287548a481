"""reasoning-gym's tasks and questions from a file, with their libraries in a process of their own."""

import importlib.util
import json

import pytest

from fathom.align.environments.base import assistant
from fathom.align.environments.library import UNFIT, GymEnvironment, LibraryWorker, QuestionsEnvironment
from fathom.errors import DataError, InputError

gym = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")


@pytest.fixture(scope="module")
def worker():
    worker = LibraryWorker()
    yield worker
    worker.close()


@gym
def test_tasks_of_a_dataset_repeat_and_score_their_own_answers_only(worker):
    domain = GymEnvironment("chain_sum", ({"min_terms": 2, "max_terms": 2}, {"min_terms": 5, "max_terms": 5}), worker)
    for level in domain.levels:
        for split in ("train", "held_out"):
            task = domain.task(3, split, level)
            assert task == domain.task(3, split, level) and task.question.count("+") + task.question.count(" - ") >= level
            assert domain.score(task, domain.demonstration(task, "high")).reward == 1
            for wrong in (task.facts["answer"] + "1", "", task.question, f"{task.facts['answer']} or 7", "9" * 5000):
                assert domain.score(task, [assistant(wrong)]).reward == 0


@gym
def test_datasets_whose_scores_cannot_be_trusted_are_refused(worker):
    for name in (*UNFIT, "no_such_dataset"):
        with pytest.raises(InputError, match=name):
            GymEnvironment(name, worker=worker)


@pytest.fixture
def questions(tmp_path):
    rows = [{"question": f"How much is {n} and {n}?", "answer": 2 * n, "reasoning": f"{n} + {n} = {2 * n}."} for n in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return QuestionsEnvironment(tmp_path / "rows.jsonl")


def test_questions_of_a_file_are_split_and_scored(questions):
    sides = [{questions.task(seed, split).question for seed in range(100)} for split in ("train", "held_out")]
    assert all(sides) and not sides[0] & sides[1]
    task = questions.task(5)
    assert questions.score(task, questions.demonstration(task, "max")).reward == 1
    assert "=" in questions.demonstration(task, "max")[0]["reasoning_content"]
    assert questions.score(task, [assistant("-1")]).reward == 0


@verify
def test_answers_that_are_no_numbers_are_compared_by_what_they_mean(tmp_path, worker):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"question": f"Expand {n}.", "answer": "x^2 + 2x + 1"}) for n in range(50)))
    domain = QuestionsEnvironment(tmp_path / "rows.jsonl", worker=worker)
    task = domain.task(0)
    for content, reward in (("1 + 2x + x^2", 1), ("$x^2+2x+1$", 1), ("x^2 + 2x", 0), ("x", 0), ("__import__('os').abort()", 0)):
        assert domain.score(task, [assistant(content)]).reward == reward, content


@verify
def test_the_libraries_process_is_confined_and_comes_back(worker):
    assert worker.ask(do="equal", gold="1/2", answer="0.5") is True
    assert worker.ask(do="nonsense") is None
    assert "Seccomp:\t2" in open(f"/proc/{worker._process.pid}/status").read()
    worker._process.kill()
    assert worker.ask(do="equal", gold="2", answer="3") is None
    assert worker.ask(do="equal", gold="2", answer="3") is False


def test_bad_files_are_named(tmp_path):
    for text in ("", "[1]", '{"question": 1}', "{"):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(DataError, match="bad.jsonl"):
            QuestionsEnvironment(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="cannot read"):
        QuestionsEnvironment(tmp_path / "none.jsonl")
