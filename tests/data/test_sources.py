"""Sources of a corpus: rows of tables, nested fields, packages, folders of many files; what is missing, in one line."""

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from fathom.data import sources
from fathom.data.sources import Source, inputs, outline, read_source
from fathom.errors import DataError, RecipeError

COUNTRY = {"name": "Atlantis", "Geography": {"Area": {"text": "12 sq km"}, "Rivers": ["Nile", "Po"], "Note": {"text": "<p>Sunk &amp; lost.</p>"}},
           "Economy": "{'Exports': {'text': 'pearls'}}"}


def read(source, root, dropped=None):
    return list(read_source(source, root, root / "downloads", 0, Counter() if dropped is None else dropped))


def test_rows_are_named_and_licensed_by_their_fields_else_by_the_source(tmp_path):
    rows = [{"text": "one\r\ntwo", "title": "First", "licence": "MIT"}, {"text": "three", "other": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, two = read(Source("a.jsonl", licence="CC0-1.0"), tmp_path)
    assert (one.text, one.name, one.licence, one.source) == ("one\ntwo", "First", "MIT", "a.jsonl")
    assert (two.text, two.name, two.licence) == ("three", "row 1", "CC0-1.0")


def test_parquet_gives_the_same_documents_as_json_lines(tmp_path):
    rows = [{"text": f"text {n}", "name": f"n{n}"} for n in range(600)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    texts = [[(document.text, document.name) for document in read(Source(name), tmp_path)] for name in ("a.jsonl", "a.parquet")]
    assert texts[0] == texts[1] and len(texts[0]) == 600


def test_several_fields_are_joined_and_nested_ones_unfolded(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(COUNTRY))
    document, = read(Source("a.jsonl", fields=("*",)), tmp_path)
    assert document.name == "Atlantis" and document.text == (
        "Geography\n\nArea: 12 sq km\nRivers:\n  - Nile\n  - Po\nNote: Sunk & lost.\n\nEconomy\n\nExports: pearls")


@pytest.mark.parametrize("value, text", [("plain {'a'", "plain {'a'"), ("{'a': [", "{'a': ["), (None, ""), (3, "3"), ("{}", "{}"),
                                         ({"a": {}}, "a:"), ("['x', 'y']", "- x\n- y"), ("[{'a'}, {[1]}]", "[{'a'}, {[1]}]")])
def test_an_outline_keeps_what_it_cannot_unfold(value, text):
    assert outline(value) == text


def test_packages_come_with_licences_and_exclusions(tmp_path):
    documents = read(Source("python-code", packages=("networkx", "sniffio"), exclude=("networkx/drawing/*", "*/__init__.py")), tmp_path)
    licences = {document.name.partition("/")[0]: document.licence for document in documents}
    assert set(licences) == {"networkx", "sniffio"} and licences["networkx"] == "BSD-3-Clause"
    assert not any(document.name.startswith("networkx/drawing") or document.name.endswith("__init__.py") for document in documents)


def test_all_installed_packages_but_evaluation_sets_are_python_code(monkeypatch, tmp_path):
    names = [name.rpartition(" ")[0] for name in inputs(Source("python-code"), tmp_path)]
    assert {"numpy", "networkx", "rich"} <= set(names) and names == sorted(names)
    monkeypatch.setattr(sources, "EVALUATION_PACKAGES", ("numpy",))
    assert "numpy" not in [name.rpartition(" ")[0] for name in inputs(Source("python-code"), tmp_path)]


def test_a_file_that_is_no_text_is_counted_among_many_and_an_error_alone(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes("Zwölf".encode("latin-1"))
    (tmp_path / "texts" / "b.txt").write_text("fine")
    dropped = Counter()
    assert [document.name for document in read(Source("texts"), tmp_path, dropped)] == ["b.txt"]
    assert dropped == {"not UTF-8 text": 1}
    with pytest.raises(DataError, match="a.txt is not UTF-8 text"):
        read(Source("texts/a.txt"), tmp_path)


def test_checksums_change_with_the_content(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("one")
    before = inputs(Source("texts"), tmp_path) | inputs(Source("b.txt"), tmp_path)
    assert set(before) == {"texts", "b.txt"} and before == inputs(Source("texts"), tmp_path) | inputs(Source("b.txt"), tmp_path)
    (tmp_path / "texts" / "a.txt").write_text("two")
    (tmp_path / "b.txt").write_text("two")
    after = inputs(Source("texts"), tmp_path) | inputs(Source("b.txt"), tmp_path)
    assert all(before[name] != after[name] for name in before)
    assert inputs(Source("synthetic:recall", max_documents=1), tmp_path) == {}


@pytest.mark.parametrize("name, content, fields, complaint", [
    ("none.jsonl", '{"body": "a"}\n', ("text",), "none.jsonl, line 1 has no field 'text', only body; set fields of none.jsonl"),
    ("list.jsonl", '["a"]\n', ("text",), "list.jsonl, line 1 is no object"),
    ("half.jsonl", '{"text": "\\ud800"}\n', ("text",), "half.jsonl, line 1 holds half a surrogate pair"),
    ("bad.parquet", "no table", ("text",), "bad.parquet: damaged, or no parquet file")])
def test_rows_that_cannot_be_read_are_one_line(tmp_path, name, content, fields, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        read(Source(name, fields=fields), tmp_path)
    assert complaint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path, complaint", [("missing.txt", "missing.txt does not exist; check the path among the sources"),
                                             ("package:no-such-package", "package:no-such-package is not installed")])
def test_a_missing_source_is_named_before_anything_is_read(tmp_path, path, complaint):
    with pytest.raises(DataError, match=complaint):
        inputs(Source(path), tmp_path)


def test_parquet_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "parquet", None)
    with pytest.raises(DataError, match=r"pip install 'fathom\[data\]'"):
        read(Source("a.parquet"), tmp_path)


@pytest.mark.parametrize("settings, complaint", [
    (dict(path="a", weight=0.0), "weight of a is 0.0"), (dict(path="a", max_bytes=0), "max_bytes of a is 0"),
    (dict(path="synthetic:poems", max_bytes=1), "there is no source 'synthetic:poems'; allowed: synthetic:recall, synthetic:recall-dense, synthetic:repeats"),
    (dict(path="synthetic:recall"), "synthetic:recall never ends; give it max_bytes or max_documents")])
def test_settings_that_make_no_sense_are_one_line(settings, complaint):
    with pytest.raises(RecipeError, match=complaint):
        Source(**settings)


def test_recall_documents_differ_with_the_seed(tmp_path):
    source = Source("synthetic:recall", max_documents=2)
    first, other = (next(read_source(source, Path(), Path(), seed, Counter())) for seed in (0, 1))
    assert first.text != other.text and "The code of the" in first.text and first.licence == "CC0-1.0"
