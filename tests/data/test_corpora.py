"""Documents from files, folders, JSON lines and packages; the held-out split."""

import gzip
import hashlib
import importlib.metadata
import json
import lzma
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, reject
from hypothesis import strategies as st

from fathom.data.corpora import Document, read_documents, split_held_out
from fathom.errors import DataError

SHIPPED = Path(__file__).parents[2] / "recipes" / "data"


def read(root, *sources):
    return list(read_documents(sources, root))


def test_text_file_is_one_document_with_provenance(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffZwölf Boxkämpfer\r\n".encode())
    assert read(tmp_path, "a.txt") == [Document("Zwölf Boxkämpfer\r\n", "a.txt", "unstated", "a.txt")]


def test_folder_is_read_recursively_and_sorted_without_hidden_empty_and_other_files(tmp_path):
    for name, text in {"b/z.md": "z", "b/a.py": "a", "c.txt": "c", ".git/x.txt": "x", "b/.y.txt": "y", "i.png": "i",
                       "b/__init__.py": ""}.items():
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert [document.name for document in read(tmp_path, "texts")] == ["b/a.py", "b/z.md", "c.txt"]
    assert [document.source for document in read(tmp_path, str(tmp_path / "texts"))] == [str(tmp_path / "texts")] * 3


@pytest.mark.parametrize("suffix, pack", [(".jsonl", bytes), (".jsonl.gz", gzip.compress), (".jsonl.xz", lzma.compress),
                                          (".jsonl.zst", zstandard.compress)])
def test_json_lines_are_read_plain_and_compressed(tmp_path, suffix, pack):
    rows = [{"text": "one", "licence": "CC0", "name": "first", "source": "book"}, {"text": "zwei\n\u2028", "extra": 3}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / f"a{suffix}").write_bytes(pack(lines.encode()))
    assert read(tmp_path, f"a{suffix}") == [Document("one", "book", "CC0", "first"),
                                            Document("zwei\n\u2028", f"a{suffix}", "unstated", "")]


def test_package_gives_its_python_files_with_the_licence_but_not_its_tests(tmp_path):
    documents = read(tmp_path, "package:networkx")
    assert {document.licence for document in documents} == {"BSD-3-Clause"}
    names = [document.name for document in documents]
    assert names == sorted(names) and "networkx/algorithms/dag.py" in names and not any("/tests/" in n for n in names)
    version = next(document.text for document in documents if document.name == "networkx/__init__.py")
    assert f'"{importlib.metadata.version("networkx")}"' in version


def test_shipped_novels_match_the_checksum_in_their_readme():
    digest = hashlib.sha256((SHIPPED / "austen.jsonl.xz").read_bytes()).hexdigest()
    assert digest in (SHIPPED / "README.md").read_text()
    documents = read(SHIPPED, "austen.jsonl.xz")
    assert len(documents) == 269 and {document.licence for document in documents} == {"public domain"}
    assert documents[50].name == "Pride and Prejudice, Chapter 1"
    assert documents[50].text.startswith("Chapter 1\n\nIt is a truth universally acknowledged, that a single man in "
                                         "possession of a good fortune, must be in want of a wife.\n\n")
    assert 3.9e6 < sum(len(document.text.encode()) for document in documents) < 4.1e6


@pytest.mark.parametrize("name, content, complaint", [
    ("missing.txt", None, "missing.txt does not exist"),
    ("empty.txt", b" \n", "empty.txt holds no text"),
    ("latin.txt", "Zwölf".encode("latin-1"), "latin.txt is not UTF-8 text"),
    ("binary.txt", b"ab\0cd", "binary.txt is a binary file"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": ', "bad.jsonl, line 2 is not JSON"),
    ("list.jsonl", b'["text"]\n', 'list.jsonl, line 1 needs a string "text"'),
    ("none.jsonl", b'{"txt": "a"}\n', 'none.jsonl, line 1 needs a string "text"'),
    ("number.jsonl", b'{"text": 3}\n', 'number.jsonl, line 1 needs a string "text"'),
    ("half.jsonl", b'{"text": "\\ud800"}\n', "half.jsonl, line 1 holds half a surrogate pair"),
    ("latin.jsonl", b'{"text": "\xe4"}\n', "latin.jsonl: damaged"),
    ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "cut.jsonl.gz: damaged"),
    ("cut.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 99)[:-9], "cut.jsonl.xz: damaged"),
    ("not.jsonl.xz", b'{"text": "a"}\n', "not.jsonl.xz: damaged"),
    ("not.jsonl.gz", b'{"text": "a"}\n', "not.jsonl.gz: damaged"),
    ("not.jsonl.zst", b'{"text": "a"}\n', "not.jsonl.zst: damaged"),
    ("package:no-such-package-here", None, "package:no-such-package-here is not installed"),
])
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path, name)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_folder_without_text_is_an_error(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match="pictures holds no text"):
        read(tmp_path, "pictures")


TEXTS = st.lists(st.text("ab \n", max_size=60), max_size=6)


@given(TEXTS, st.integers(1, 30), st.floats(0.01, 0.4))
def test_split_keeps_every_character_on_one_side_only(texts, piece_bytes, share):
    documents = [Document(text, "s", name=str(number)) for number, text in enumerate(texts)]
    try:
        train, held_out = split_held_out(documents, share, piece_bytes)
    except DataError:
        reject()  # all pieces alike, or all held out
    assert train and held_out
    assert sorted("".join(document.text for document in train + held_out)) == sorted("".join(texts))
    assert not {document.text for document in train} & {document.text for document in held_out}
    for number, text in enumerate(texts):
        parts = [document for document in train + held_out if document.name.split(" [")[0] == str(number)]
        parts.sort(key=lambda document: int(document.name.partition("[")[2].partition("-")[0] or 0))
        assert "".join(part.text for part in parts) == text


def test_split_holds_out_about_its_share_and_does_not_depend_on_other_documents():
    texts = ["\n\n".join(f"Paragraph {n} of {title}." * 3 for n in range(400)) for title in range(8)]
    documents = [Document(text, "s", name=str(number)) for number, text in enumerate(texts)]
    train, held_out = split_held_out(documents, 0.1, 256)
    size = sum(len(document.text) for document in held_out) / sum(map(len, texts))
    assert 0.06 < size < 0.14
    again = split_held_out(documents[:4], 0.1, 256)[1]
    assert [document for document in held_out if document.name[0] in "0123"] == again
    assert all(document.text.endswith("\n\n") or document.text[-1] == "." for document in train + held_out)


def test_small_corpus_still_holds_one_piece_out():
    train, held_out = split_held_out([Document("a\n\nb\n\nc\n\n", "s", name="n")], 1e-9, 1)
    assert len(held_out) == 1 and len(held_out[0].text) == 3 and sum(len(document.text) for document in train) == 6


@pytest.mark.parametrize("texts, share", [(["one piece only"], 0.5), ([], 0.5), (["a", "b"], 0.0), (["a", "b"], 1.0)])
def test_split_that_leaves_nothing_to_train_on_is_an_error(texts, share):
    with pytest.raises(DataError):
        split_held_out([Document(text, "s") for text in texts], share)
