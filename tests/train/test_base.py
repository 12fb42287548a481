"""A run that goes on from another model: its weights, its tokenizer, and a clear line where they do not fit."""

import shutil

import pytest
import torch

from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import find_model
from fathom.errors import RecipeError
from fathom.recipe import load
from fathom.text.tokenizer import Tokenizer
from fathom.train.pretrain import Pretrain
from tests.runs import fathom, losses, micro_recipe


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    recipe = micro_recipe(tmp_path_factory.mktemp("first"))
    fathom("train", recipe, check=True)
    return recipe


def test_it_begins_with_the_weights_and_the_tokenizer_of_its_base(first, tmp_path):
    result = fathom("train", first, "--set", f"base={first.parent / 'run'}", "--set", f"run={tmp_path / 'second'}", "--set", "schedule.steps=5",
                    "--set", "schedule.peak_rate=1e-9", "--set", "schedule.final_rate=0", "--set", "schedule.warmup_steps=0",
                    "--set", "schedule.decay_steps=0", "--set", "schedule.bias_speed=0")
    assert result.returncode == 0, result.stderr
    before, after = (load_model(find_model(run)).state_dict() for run in (first.parent / "run", tmp_path / "second"))
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-6)
    assert losses(tmp_path / "second")[0][1] < losses(first.parent / "run")[0][1] - 1
    shutil.move(first.parent / "run", first.parent / "moved")  # a run needs its base at its start only
    resumed = fathom("train", tmp_path / "second" / "recipe.toml", "--resume")
    shutil.move(first.parent / "moved", first.parent / "run")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "second" / "tokenizer" / "tokenizer.json").read_bytes() == (first.parent / "run" / "tokenizer" / "tokenizer.json").read_bytes()


def test_a_corpus_of_another_tokenizer_is_refused(first, tmp_path):
    (tmp_path / "corpus.toml").write_text(f'out = "{tmp_path / "corpus"}"\nvocab_size = 300\nheld_out = 0.2\ntemplates = false\n'
                                          '[[sources]]\npath = "synthetic:recall"\nmax_documents = 30\n')
    prepared = fathom("data", "prepare", tmp_path / "corpus.toml")
    assert prepared.returncode == 0, prepared.stderr
    assert Tokenizer.load(tmp_path / "corpus" / "tokenizer").fingerprint != Tokenizer.load(first.parent / "run" / "tokenizer").fingerprint
    result = fathom("train", first, "--set", f"base={first.parent / 'run'}", "--set", f"run={tmp_path / 'run'}", "--set",
                    f'data={{prepared = "{tmp_path / "corpus"}"}}')
    assert result.returncode == 2 and "was made with another tokenizer" in result.stderr and "Traceback" not in result.stderr


def test_a_base_that_is_none_or_brings_another_attention_is_refused(first, tmp_path):
    result = fathom("train", first, "--set", f"base={tmp_path / 'nothing'}", "--set", f"run={tmp_path / 'run'}")
    assert result.returncode == 2 and "neither a model folder" in result.stderr and not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match="base brings its own attention"):
        load(Pretrain, first, ["base=somewhere", 'attention="gqa"'])
