"""A corpus from a recipe: every document accounted for, the same bytes every time, whole or not there at all."""

import json
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fathom.data import prepare as module
from fathom.data.duplicates import word_hashes
from fathom.data.prepare import Prepare, prepare
from fathom.data.prepared import adopt
from fathom.data.sources import Source
from fathom.data.store import TokenStore
from fathom.errors import DataError, FathomError, RecipeError
from fathom.recipe import load
from fathom.text.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer
from fathom.train.pretrain import Pretrain, pretrain
from tests.runs import command, environment, fathom, losses, micro_recipe

QUESTION = "A farmer has seventeen sheep and buys nine more at the market on Monday; how many sheep does the farmer have now?"
NOUNS = "captain ship island harbour road river bread letter window garden bell winter baker valley church money horse lamp".split()
VERBS = "saw found left carried painted followed sold kept forgot wanted counted crossed".split()


def story(rng, sentences):
    """Prose that the filters let through, and no two alike."""
    return "".join(f"The {rng.choice(NOUNS)} of the {rng.choice(NOUNS)} {rng.choice(VERBS)} a {rng.choice(NOUNS)} with {rng.randint(2, 999)} "
                   f"and that was in the {rng.choice(NOUNS)}.\n" for _ in range(sentences))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two sources: stories, with duplicates, a near copy, an evaluation text and rubbish; and a folder of code."""
    folder, rng = tmp_path_factory.mktemp("root"), random.Random(0)
    stories = [story(rng, rng.randint(5, 60)) for _ in range(80)]
    rows = [*stories, stories[3], stories[4] + "One more.\n", story(rng, 8) + QUESTION + "\n", "short", "1234 5678 " * 40]
    (folder / "stories.jsonl").write_text("\n".join(json.dumps({"text": text, "name": f"story {n}"}) for n, text in enumerate(rows)))
    (folder / "code").mkdir()
    for number in range(25):
        words = [[rng.choice(NOUNS) for _ in range(4)] for _ in range(40)]
        (folder / "code" / f"m{number}.py").write_text("".join(f"def {a}_{b}({c}):\n    return {c}.{d}({a}, {b})\n\n\n" for a, b, c, d in words))
    (folder / "questions.jsonl").write_text(json.dumps({"question": QUESTION, "answer": "26"}))
    return folder


def recipe(root, out, **settings):
    settings = dict(vocab_size=400, held_out=0.1, decontaminate=("questions.jsonl",), token_splitting=0.05, fim_rate=0.3, long_tokens=1200) | settings
    sources = (Source("stories.jsonl", licence="CC0-1.0"), Source("code"), Source("synthetic:recall", max_documents=20))
    return Prepare(out=str(out), root=str(root), sources=settings.pop("sources", sources), **settings)


def make(root, out, **settings):
    return prepare(recipe(root, out, **settings), Path(), Console(quiet=True))


def content(folder):
    """Every file of a folder by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def corpus(root, tmp_path_factory):
    """The corpus, made in one go."""
    return make(root, tmp_path_factory.mktemp("made") / "corpus")


def plain_texts(corpus, name):
    """The documents of a store as they were before fill in the middle."""
    tokenizer, store = Tokenizer.load(corpus / "tokenizer"), TokenStore.open(corpus / name, verify=True)
    begin, hole, end = (tokenizer.special_ids[token] for token in (FIM_BEGIN, FIM_HOLE, FIM_END))
    texts = []
    for index in range(len(store.lengths)):
        ids = store.document(index).tolist()
        assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
        ids = ids[1:-1]
        if ids[0] == begin:
            at, last = ids.index(hole), ids.index(end)
            ids = ids[1:at] + ids[last + 1:] + ids[at + 1:last]
        texts.append(tokenizer.decode(ids))
    return texts


def test_every_document_that_was_read_is_stored_once_or_has_a_reason(root, corpus):
    manifest = json.loads((corpus / "manifest.json").read_text())
    stories, code, recall = manifest["sources"]
    assert {reason: counts["documents"] for reason, counts in stories["dropped"].items()} == {
        "exact duplicate": 1, "near duplicate": 1, "holds an evaluation text": 1, "too short": 1, "mostly numbers and signs": 1}
    read = [json.loads(line)["text"] for line in (root / "stories.jsonl").read_text().splitlines()]
    stored = plain_texts(corpus, "train") + plain_texts(corpus, "held_out")
    assert all(stored.count(text) == 1 for text in read[:80])
    assert not any(text in stored for text in read[81:])
    for source in manifest["sources"]:
        compared = sum(counts["documents"] for reason, counts in source["dropped"].items() if "duplicate" in reason)
        assert source["read"]["documents"] == source["train"]["documents"] + source["held_out"]["documents"] + compared
        assert source["train"]["documents"] and source["held_out"]["documents"]
    assert stories["licences"] == ["CC0-1.0"] and code["licences"] == ["unstated"] and recall["licences"] == ["CC0-1.0"]
    assert all(checksum in json.dumps(manifest) for checksum in code["inputs"].values()) and manifest["evaluation"]["texts"] == 1
    for name in ("train", "held_out", "long"):
        store = TokenStore.open(corpus / name)
        for field in ("documents", "bytes", "tokens"):
            assert store.manifest[field] == sum(source[name][field] for source in manifest["sources"])


def test_fill_in_the_middle_splitting_and_long_documents_follow_the_recipe(corpus):
    tokenizer, train, long = Tokenizer.load(corpus / "tokenizer"), TokenStore.open(corpus / "train"), TokenStore.open(corpus / "long")
    filled = (train.tokens == tokenizer.special_ids[FIM_BEGIN]).sum()
    assert 0.15 < filled / len(train.lengths) < 0.45
    assert FIM_BEGIN not in tokenizer.decode(TokenStore.open(corpus / "held_out").tokens)
    assert sorted(long.lengths) == sorted(train.lengths[train.lengths >= 1200]) and len(long.lengths) > 1
    texts, splits = plain_texts(corpus, "held_out"), plain_texts(corpus, "train")
    held, trained = (sum(map(len, tokenizer.encode_many(part))) for part in (texts, splits))
    assert TokenStore.open(corpus / "held_out").total_tokens == held + 2 * len(texts)
    assert train.total_tokens > 1.02 * trained


def test_the_same_recipe_gives_the_same_bytes_with_any_number_of_processes(root, corpus, tmp_path):
    again = make(root, tmp_path / "again", workers=2)
    assert content(again) == content(corpus)
    other = make(root, tmp_path / "other", seed=1)
    assert content(other)["train/tokens.bin"] != content(corpus)["train/tokens.bin"]
    assert [path.name for path in tmp_path.iterdir()] == ["again", "other"] or {path.name for path in tmp_path.iterdir()} == {"again", "other"}


def test_weights_set_the_shares(root, tmp_path):
    sources = (Source("stories.jsonl", weight=3), Source("code", weight=1))
    manifest = json.loads((make(root, tmp_path / "out", sources=sources, repeat=2.0) / "manifest.json").read_text())
    stories, code = (source["train"]["bytes"] for source in manifest["sources"])
    assert stories / (stories + code) == pytest.approx(0.75, abs=0.03)
    code = manifest["sources"][1]
    aside = code["held_out"]["documents"] + code["dropped"].get("held out beyond its share", {"documents": 0})["documents"]
    assert code["train"]["documents"] == 2 * (25 - aside) > 0


def test_killed_at_any_stage_the_same_command_finishes_with_the_same_bytes(root, corpus, tmp_path):
    out, work = tmp_path / "corpus", tmp_path / ".corpus.work"
    write_recipe(root, tmp_path)
    for stage, end in ((".lock", signal.SIGKILL), ("read-*", signal.SIGKILL), ("tokenizer-*", signal.SIGINT), ("tokens-*", signal.SIGKILL)):
        process = subprocess.Popen(command("data", "prepare", tmp_path / "recipe.toml"), env=environment(), stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 300
        while not list(work.glob(stage)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(end)
        process.communicate(timeout=300)
        assert not out.exists() or content(out) == content(corpus)
    result = fathom("data", "prepare", tmp_path / "recipe.toml", timeout=300)
    assert result.returncode == 0 and "bytes each; packed: 9" in result.stdout, result.stdout + result.stderr
    assert content(out) == content(corpus)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "recipe.toml"]


def write_recipe(root, folder):
    (folder / "recipe.toml").write_text(
        f'out = "{folder / "corpus"}"\nroot = "{root}"\nvocab_size = 400\nheld_out = 0.1\ndecontaminate = ["questions.jsonl"]\n'
        'token_splitting = 0.05\nfim_rate = 0.3\nlong_tokens = 1200\n[[sources]]\npath = "stories.jsonl"\nlicence = "CC0-1.0"\n'
        '[[sources]]\npath = "code"\n[[sources]]\npath = "synthetic:recall"\nmax_documents = 20\n')


def test_finished_parts_are_taken_over_after_an_interruption(root, corpus, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as broken:
        broken.setattr(module, "_join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(root, tmp_path / "out")
    for name in ("read_part", "tokenise_part"):
        monkeypatch.setattr(module, name, interrupted)
    assert content(make(root, tmp_path / "out")) == content(corpus)


def test_a_finished_corpus_is_not_made_again_and_never_overwritten(root, corpus, monkeypatch):
    monkeypatch.setattr(module, "workshop", None)
    before = content(corpus)
    assert make(root, corpus) == corpus
    with pytest.raises(DataError, match="holds something else than this recipe"):
        make(root, corpus, seed=5)
    assert content(corpus) == before


def test_a_full_disk_is_one_line_and_the_next_attempt_goes_on(root, corpus, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (2_000, 60_000, 150_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            with pytest.raises(FathomError, match="File too large") as error:
                make(root, tmp_path / "out")
            assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(make(root, tmp_path / "out")) == content(corpus)


def test_a_recipe_from_the_command_line(root, tmp_path):
    shown = fathom("data", "prepare", "--help", timeout=300)
    assert shown.returncode == 0 and "fathom data prepare" in shown.stdout and "Example:" in shown.stdout
    write_recipe(root, tmp_path)
    wrong = fathom("data", "prepare", tmp_path / "recipe.toml", "--set", "tokeniser=train", timeout=300)
    assert wrong.returncode == 2 and "did you mean tokenizer?" in wrong.stderr


def test_another_process_on_the_same_corpus_is_refused(root, tmp_path):
    with module.workshop(tmp_path / "out"), pytest.raises(FathomError, match="another process prepares"):
        make(root, tmp_path / "out")


@pytest.mark.parametrize("settings, complaint", [
    (dict(sources=(Source("stories.jsonl"), Source("gone.jsonl"))), "gone.jsonl does not exist"),
    (dict(decontaminate=("gone.jsonl",)), "gone.jsonl does not exist; check the paths of decontaminate"),
    (dict(sources=(Source("stories.jsonl", min_bytes=10**9),)), r"stories.jsonl holds no text to keep: too short \(85\)"),
    (dict(sources=(Source("code", allow_licences=("MIT",)),), workers=2), r"code holds no text to keep: licence not allowed \(25\)")])
def test_what_cannot_be_made_is_one_line_and_leaves_no_corpus(root, tmp_path, settings, complaint):
    with pytest.raises(DataError, match=complaint) as error:
        make(root, tmp_path / "out", **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings, complaint", [
    (dict(sources=()), "sources is empty"), (dict(sources=(Source("a", weight=1.0), Source("b"))), "some sources have a weight"),
    (dict(sources=(Source("a"), Source("a"))), "listed twice"), (dict(fim_rate=1.5), "fim_rate is 1.5"),
    (dict(held_out=0.0), "held_out"), (dict(workers=0), "workers is 0")])
def test_a_recipe_that_makes_no_sense_is_one_line(settings, complaint):
    with pytest.raises(RecipeError, match=complaint):
        Prepare(**(dict(out="o", sources=(Source("a"),)) | settings))


@pytest.mark.parametrize("name", ["corpus-mixed", "corpus-python", "corpus-debian"])
def test_shipped_recipes_load(name):
    assert load(Prepare, Path(__file__).parents[2] / "recipes" / f"{name}.toml", ["root=x", "workers=2"]).root == "x"


def test_no_trained_document_is_a_copy_of_held_out_text(root, corpus):
    held = [set(zip(*(words[i:] for i in range(5)), strict=False)) for words in
            (word_hashes(text).tolist() for text in plain_texts(corpus, "held_out") if "def " not in text and "The code of" not in text)]
    for text in plain_texts(corpus, "train"):
        words = word_hashes(text).tolist()
        own = set(zip(*(words[i:] for i in range(5)), strict=False))
        assert all(len(own & other) < 0.8 * len(own | other) for other in held)


def test_a_run_trains_on_a_prepared_corpus_and_resumes(corpus, tmp_path):
    path = micro_recipe(tmp_path)
    text = path.read_text().replace('sources = ["text"]', f'prepared = "{corpus}"')
    path.write_text(text)
    config = json.loads((tmp_path / "model.json").read_text()) | dict(vocab_size=400)
    (tmp_path / "model.json").write_text(json.dumps(config))
    run = pretrain(load(Pretrain, path), tmp_path, False, Console(quiet=True))
    assert (run / "data" / "train").is_symlink() and not (run / "data" / "held_out").is_symlink()
    assert (run / "data" / "corpus.json").read_bytes() == (corpus / "manifest.json").read_bytes()
    assert len(losses(run)) == 20
    shutil.rmtree(run / "checkpoints" / "step-000020")
    pretrain(load(Pretrain, path), tmp_path, True, Console(quiet=True))
    assert losses(run)[-1][0] == 20
    with pytest.raises(DataError, match="nowhere is no prepared corpus"):
        pretrain(load(Pretrain, path, ["data.prepared=nowhere", f"run={tmp_path / 'other'}"]), tmp_path, False, Console(quiet=True))
    with pytest.raises(RecipeError, match="give either sources"):
        load(Pretrain, path, ['data.sources=["text"]'])


def test_a_damaged_corpus_is_not_adopted(root, corpus, tmp_path):
    copied = make(root, tmp_path / "copy")
    tokens = np.fromfile(copied / "train" / "tokens.bin", "<u2")
    tokens[5] ^= 1
    tokens.tofile(copied / "train" / "tokens.bin")
    with pytest.raises(DataError, match="tokens.bin does not match its checksum"):
        adopt(copied, tmp_path / "run")
    (copied / "held_out" / "manifest.json").unlink()
    with pytest.raises(DataError, match="held_out/manifest.json is missing or changed"):
        adopt(copied, tmp_path / "run")
