"""The token store: what is written is read, reused when nothing changed, and never half there."""

import errno
import os

import numpy as np
import pytest

from fathom import files
from fathom.data import store as store_module
from fathom.data.corpora import Document
from fathom.data.store import TokenStore, build_store
from fathom.errors import DataError

DOCUMENTS = [Document("abc", "book", "public domain", "1"), Document("Größe", "book", "public domain", "2"),
             Document("x = 1\n", "code", "MIT", "a.py")]


def encode_bytes(texts):
    return [list(text.encode()) for text in texts]


def build(folder, documents=DOCUMENTS, encode=encode_bytes, **changes):
    settings = dict(bos_id=256, eos_id=257, vocab_size=258, fingerprint="bytes") | changes
    return build_store(folder, documents, encode, **settings)


def must_not_encode(texts):
    raise AssertionError("encoded again")


@pytest.mark.parametrize("vocab_size, dtype", [(258, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_documents_come_back_between_bos_and_eos(tmp_path, vocab_size, dtype):
    build(tmp_path / "store", vocab_size=vocab_size)
    store = TokenStore.open(tmp_path / "store", verify=True)
    for index, document in enumerate(DOCUMENTS):
        assert store.document(index).tolist() == [256, *document.text.encode(), 257]
    assert store.tokens.dtype == dtype and store.total_tokens == len(store.tokens) == 22
    assert store.byte_lengths.tolist() == [3, 7, 6] and store.lengths.tolist() == [5, 9, 8]


def test_manifest_counts_by_source_and_licence(tmp_path):
    manifest = build(tmp_path / "store", settings={"share": 0.1}).manifest
    assert (manifest["documents"], manifest["tokens"], manifest["bytes"]) == (3, 22, 16)
    assert manifest["sources"] == {"book": dict(documents=2, tokens=14, bytes=10),
                                   "code": dict(documents=1, tokens=8, bytes=6)}
    assert manifest["licences"]["MIT"] == dict(documents=1, tokens=8, bytes=6)
    assert manifest["fingerprint"] == "bytes" and manifest["settings"] == {"share": 0.1}


def test_same_content_tokenizer_and_settings_are_not_encoded_again(tmp_path):
    first = build(tmp_path / "store")
    assert build(tmp_path / "store", encode=must_not_encode).manifest == first.manifest


@pytest.mark.parametrize("changes", [
    dict(fingerprint="other"), dict(eos_id=255), dict(vocab_size=300), dict(settings={"share": 0.2}),
    dict(documents=DOCUMENTS[:2]), dict(documents=[*DOCUMENTS[:2], Document("x = 2\n", "code", "MIT", "a.py")]),
    dict(documents=[*DOCUMENTS[:2], Document("x = 1\n", "code", "GPL", "a.py")]),
])
def test_any_change_replaces_the_store(tmp_path, changes):
    old = build(tmp_path / "store").manifest["key"]
    new = build(tmp_path / "store", **changes).manifest["key"]
    assert new != old and TokenStore.open(tmp_path / "store", verify=True).manifest["key"] == new


def test_progress_counts_bytes_up_to_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "BATCH_BYTES", 4)
    seen = []
    build(tmp_path / "store", progress=seen.append)
    assert seen == [10, 16]


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy"])
def test_damage_is_found_by_size_at_once_and_by_checksum_on_demand(tmp_path, name):
    build(tmp_path / "store")
    path = tmp_path / "store" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=f"{name} has .* bytes instead of"):
        TokenStore.open(tmp_path / "store")
    path.write_bytes(whole)
    flip_a_byte(path)
    with pytest.raises(DataError, match=f"{name} does not match its checksum"):
        TokenStore.open(tmp_path / "store", verify=True)
    path.unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        TokenStore.open(tmp_path / "store")


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"format": 99}'])
def test_damaged_manifest_is_an_error_and_is_rebuilt(tmp_path, manifest):
    build(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text(manifest)
    with pytest.raises(DataError, match="prepare the data again"):
        TokenStore.open(tmp_path / "store")
    assert build(tmp_path / "store").total_tokens == 22


def test_truncated_store_is_rebuilt(tmp_path):
    build(tmp_path / "store")
    (tmp_path / "store" / "tokens.bin").write_bytes(b"")
    assert build(tmp_path / "store").total_tokens == 22


def test_folder_that_is_no_store_is_never_replaced(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("Dear mother")
    with pytest.raises(DataError, match="letters exists and is no token store"):
        build(tmp_path / "letters")
    assert (tmp_path / "letters" / "mother.txt").read_text() == "Dear mother"


def test_missing_store_names_the_folder(tmp_path):
    with pytest.raises(DataError, match="nowhere is no token store"):
        TokenStore.open(tmp_path / "nowhere")


class FullDisk:
    """A file on a disk with room for six more bytes."""

    def __init__(self, path, mode):
        self.file = open(path, mode)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.file.close()

    def write(self, content):
        if self.file.tell() + len(content) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(content)


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["tokens", "documents", "sync"])
def test_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch, place):
    before = build(tmp_path / "store").manifest
    with monkeypatch.context() as full:
        if place == "tokens":
            full.setattr(store_module, "open", FullDisk, raising=False)
        elif place == "documents":
            full.setattr(np, "save", no_space)
        else:
            full.setattr(files.os, "fsync", no_space)
        for folder in ("store", "fresh"):
            with pytest.raises(DataError, match=f"{folder}.*No space left on device.*free some space"):
                build(tmp_path / folder, fingerprint="other")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert TokenStore.open(tmp_path / "store", verify=True).manifest == before


def test_interrupt_leaves_nothing_behind(tmp_path):
    def interrupted(texts):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "store", encode=interrupted)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ids", [[258], [-1]])
def test_id_outside_the_vocabulary_is_an_error(tmp_path, ids):
    with pytest.raises(DataError, match="outside the vocabulary of 258"):
        build(tmp_path / "store", encode=lambda texts: [ids for _ in texts])


def test_nothing_to_store_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no documents"):
        build(tmp_path / "store", documents=[])
