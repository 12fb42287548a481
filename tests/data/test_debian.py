"""Debian's documentation: packages asked of apt, read without dpkg, with the licence of their copyright file."""

import gzip
import tomllib
from pathlib import Path

import pytest

from fathom.data import debian
from fathom.data.corpora import Document
from fathom.data.debian import deb_documents, download, find_packages
from fathom.data.html import html_text
from fathom.errors import DataError
from tests.data.debs import install_apt, write_deb

COPYRIGHT = b"Format: https://x/\n\nFiles: debian/*\nLicense: GPL-3\n\nFiles: *\nCopyright: someone\nLicense: BSD-3-clause\n text\n"
DOC = "usr/share/doc/good-doc/"
FILES = {DOC + "html/index.html": b"<html><body><nav>Home</nav><h1>Good</h1><p>It works.</p></body></html>",
         DOC + "notes.txt.gz": gzip.compress("Zwölf notes.\n".encode()), DOC + "changelog.gz": gzip.compress(b"old"),
         DOC + "picture.png": b"\x89PNG", DOC + "latin.txt": b"\xe4", DOC + "html/genindex.html": b"<p>index</p>",
         DOC + "html/_sources/index.rst.txt": b"Good", DOC + "empty.txt": b"\n", "usr/share/dictd/words.dict.dz": gzip.compress(b"word: a sound"),
         DOC + "copyright": COPYRIGHT}


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """A machine whose apt offers good-doc and old-doc."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    write_deb(mirror / "good-doc_1.0_all.deb", FILES)
    write_deb(mirror / "old-doc_2_all.deb", {"usr/share/doc/old-doc/a.txt": b"Text.\n", "usr/share/doc/old-doc/copyright":
                                             b"This may be used under the Apache License or the GPL.\n"})
    install_apt(monkeypatch, tmp_path, sorted(mirror.iterdir()))
    return tmp_path


def test_documents_of_a_package_have_text_licence_and_name(apt):
    package, = find_packages(("good-doc",))
    deb = download(package, apt / "downloads")
    assert list(deb_documents(deb, "debian-docs", "good-doc")) == [
        Document("Good\n\nIt works.\n", "debian-docs", "BSD-3-clause", f"good-doc/{DOC}html/index.html"),
        Document("Zwölf notes.\n", "debian-docs", "BSD-3-clause", f"good-doc/{DOC}notes.txt"),
        Document("\0", "debian-docs", "BSD-3-clause", f"good-doc/{DOC}latin.txt"),
        Document("word: a sound", "debian-docs", "BSD-3-clause", "good-doc/usr/share/dictd/words.dict")]


def test_licences_are_guessed_from_older_copyright_files(apt):
    package, = find_packages(("old-doc",))
    document, = deb_documents(download(package, apt / "downloads"), "debian-docs", "old-doc")
    assert document.licence == "Apache and GPL"


def test_a_whole_download_is_used_again_and_a_torn_one_replaced(apt):
    packages = find_packages(("old-doc", "good-doc"))
    assert [package.name for package in packages] == ["old-doc", "good-doc"]
    deb = download(packages[0], apt / "downloads")
    whole, stamp = deb.read_bytes(), deb.stat().st_mtime_ns
    assert download(packages[0], apt / "downloads").stat().st_mtime_ns == stamp
    deb.write_bytes(whole[:-5])
    assert download(packages[0], apt / "downloads").read_bytes() == whole


def test_unknown_package_and_missing_apt_are_one_line(apt, monkeypatch):
    with pytest.raises(DataError, match="apt says: Unable to locate package no-doc; run apt-get update"):
        find_packages(("good-doc", "no-doc"))
    monkeypatch.setenv("PATH", str(apt))
    with pytest.raises(DataError, match="debian-docs needs apt-get, which Debian, Ubuntu"):
        find_packages(("good-doc",))


@pytest.mark.parametrize("damage", [lambda deb: b"no archive", lambda deb: deb[:-40], lambda deb: deb[:100]])
def test_a_damaged_package_is_one_line(tmp_path, damage):
    path = tmp_path / "a.deb"
    write_deb(path, FILES)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"^a\.deb (is damaged|is no Debian package|has no data)"):
        list(deb_documents(path, "debian-docs", "a"))


@pytest.mark.parametrize("page, text", [
    ("<h1>A</h1><p>One <b>bold</b>\n word.<p>Two", "A\n\nOne bold word.\n\nTwo\n"),
    ("<ul><li>a<li>b <i>c</i></ul>end", "a\nb c\n\nend\n"),
    ("x<pre>def f():\n    return 1\n</pre>y", "x\n\ndef f():\n    return 1\n\ny\n"),
    ("<table><tr><td>1</td><td>2</td></tr><tr><td>3</td></tr></table>", "1\t2\n3\n"),
    ("<div>menu</div><main><p>Only this.</p></main>", "Only this.\n"),
    ("<script>x</script><style>y</style><p>a<br>b &amp; c</p>", "a\nb & c\n"), ("", ""), ("<body> \n </body>", ""),
    ("<div>" * 3000 + "deep", "")])
def test_html_becomes_readable_text(page, text):
    assert html_text(page) == text


@pytest.mark.parametrize("page, text", [
    ('<meta charset="iso-8859-1"><p>Zwölf'.encode("latin-1"), "Zwölf\n"), ("<p>Zwölf".encode(), "Zwölf\n"),
    ("<p>Zwölf".encode("latin-1"), "Zw\ufffdlf\n"), ("<meta charset=none><p>Zwölf".encode("latin-1"), "Zw\ufffdlf\n"),
    ('<?xml version="1.0" encoding="EUC-KR"?><p>한국'.encode("euc-kr"), "한국\n")])
def test_html_is_read_in_the_encoding_it_names(page, text):
    assert html_text(page) == text


def test_html_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr("fathom.data.html.LexborHTMLParser", None)
    with pytest.raises(DataError, match=r"pip install 'fathom\[data\]'"):
        html_text("<p>a</p>")


def test_the_default_packages_are_the_recipes():
    recipe = tomllib.loads((Path(__file__).parents[2] / "recipes" / "corpus-debian.toml").read_text())
    assert tuple(recipe["sources"][0]["packages"]) == debian.PACKAGES
