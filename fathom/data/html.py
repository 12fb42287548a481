"""HTML pages -> readable text: headings, paragraphs and code as they stand, without menus and scripts."""

import re

from fathom.errors import DataError

try:
    from selectolax.lexbor import LexborHTMLParser, LexborNode
except ImportError:
    LexborHTMLParser = LexborNode = None

DROPPED = ("script, style, noscript, svg, form, nav, footer, button, iframe, [role=navigation], .sphinxsidebar, .related, "
           ".headerlink, .navheader, .navfooter, .toc, .breadcrumb, .sidebar")
MAIN = ("main", "[role=main]", "article", "body")
BLOCKS = frozenset("p div section article main body h1 h2 h3 h4 h5 h6 ul ol dl dt dd li table tr pre blockquote figure "
                   "figcaption header address details summary hr".split())
CLOSE = frozenset("li tr dt dd".split())  # one line feed between these, two between other blocks
DEEPEST = 200


def html_text(page: bytes | str) -> str:
    """The text of a page: blocks apart by blank lines, lists and rows by lines, `pre` verbatim; "" where there is none.

    Raises DataError where selectolax is missing.
    """
    if LexborHTMLParser is None:
        raise DataError("HTML needs more packages; run: pip install 'fathom[data]'")
    tree = LexborHTMLParser(_decoded(page) if isinstance(page, bytes) else page)
    for node in tree.css(DROPPED):
        node.decompose()
    root = next((found for found in map(tree.css_first, MAIN) if found is not None), None)
    if root is None:
        return ""
    pieces: list[str] = []
    _walk(root, pieces, False, 0)
    text = "".join(pieces)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n" if text.strip() else ""


def _decoded(page: bytes) -> str:
    """UTF-8, else what the page says; what neither explains becomes U+FFFD, which the filters count."""
    try:
        return page.decode("utf-8-sig")
    except UnicodeDecodeError:
        said = re.search(rb"(?:charset|encoding)=[\"']?([\w-]+)", page[:2048])
    try:
        return page.decode(said[1].decode() if said else "utf-8", "replace")
    except LookupError:
        return page.decode("utf-8", "replace")


def _walk(node: "LexborNode", pieces: list[str], verbatim: bool, depth: int) -> None:
    """Append a node's text; white space is folded outside `pre`."""
    for child in node.iter(include_text=True):
        if child.tag == "-text":
            text = child.text_content or ""
            if not verbatim:
                text = re.sub(r"\s+", " ", text)
                if not pieces or pieces[-1].endswith(("\n", " ")):
                    text = text.lstrip(" ")
            if text:
                pieces.append(text)
        elif child.tag == "br":
            pieces.append("\n")
        elif child.tag in BLOCKS:
            border = "\n" if child.tag in CLOSE else "\n\n"
            _border(pieces, border)
            if depth < DEEPEST:
                _walk(child, pieces, verbatim or child.tag == "pre", depth + 1)
            _border(pieces, border)
        elif depth < DEEPEST:
            if child.tag in ("td", "th") and pieces and not pieces[-1].endswith(("\n", " ", "\t")):
                pieces.append("\t")
            _walk(child, pieces, verbatim, depth + 1)


def _border(pieces: list[str], border: str) -> None:
    """End a block with `border`, unless the text so far ends so already."""
    tail = "".join(pieces[-2:])
    ended = len(tail) - len(tail.rstrip("\n"))
    if tail and ended < len(border):
        pieces.append(border[ended:])
