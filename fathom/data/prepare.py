"""`fathom data prepare`: a recipe of sources becomes a prepared corpus, with a manifest that accounts for every document.

Report section 4.1. In order: read and filter each source; compare all; choose what is held out and what is mixed; train
a tokenizer; tokenise; join. Same recipe and inputs, same bytes. The result appears when it is whole.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from fathom.data import corpora
from fathom.data.duplicates import Contained
from fathom.data.mixing import Choice, choose
from fathom.data.reading import Part, Reading, evaluation_texts, read_part
from fathom.data.sources import Source, inputs
from fathom.data.store import MANIFEST, StoreWriter
from fathom.data.tokenising import STORES, Rates, tokenise_part
from fathom.data.workshop import finished, make_parts, unfinished_bytes, workshop
from fathom.errors import CheckpointError, DataError, RecipeError
from fathom.files import new_folder, sha256
from fathom.text.tokenizer import Tokenizer

FORMAT = 1
SAMPLE_PIECE = 8192  # bytes of text that a tokenizer's sample takes or leaves


@dataclass(frozen=True)
class Prepare:
    """A corpus to make. Sources start at `root` (of the working folder), or at the recipe's folder without one.

    `tokenizer`: "train", "official" or a folder. Rates and shares are between 0 and 1.
    """

    out: str
    sources: tuple[Source, ...]
    root: str | None = None
    seed: int = 0
    tokenizer: str = "train"
    vocab_size: int = 8192  # of a tokenizer that is trained
    tokenizer_bytes: int = 20_000_000  # of text, about, that it is trained on
    held_out: float = 0.01
    near_duplicates: float = 0.8  # share of five-word shingles in common from which on a text is a copy; 0: not looked for
    templates: bool = True  # leave out documents whose lines many others have
    decontaminate: tuple[str, ...] = ()  # files of evaluation sets
    contained: float = 0.5  # share of an evaluation text's 13-grams in a document that is left out
    fim_rate: float = 0.1
    token_splitting: float = 0.0
    repeat: float = 1.0  # times that a source may be repeated to fill its share
    train_bytes: int | None = None  # of the mix; without it as much as the scarcest source allows
    long_tokens: int | None = None  # documents of at least so many tokens are stored in long/, too
    workers: int = 1  # processes that read

    def __post_init__(self):
        if not self.sources:
            raise RecipeError("sources is empty; add a [[sources]] section with a path")
        if len({source.weight is None for source in self.sources}) > 1:
            raise RecipeError("some sources have a weight and some have none; give one to all or to none")
        if len({(source.path, source.packages) for source in self.sources}) < len(self.sources):
            raise RecipeError("a source is listed twice; raise its weight instead")
        for name in ("near_duplicates", "fim_rate", "token_splitting"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; allowed: 0 to 1")
        if not 0 < self.held_out < 1 or not 0 < self.contained <= 1:
            raise RecipeError("held_out and contained must lie between 0 and 1")
        for name in ("vocab_size", "tokenizer_bytes", "workers", "repeat", "train_bytes", "long_tokens"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise RecipeError(f"{name} is {value}; allowed: above 0")


def prepare(recipe: Prepare, recipe_folder: Path, console: Console) -> Path:
    """Make the corpus and return its folder; finished parts of an interrupted attempt are taken over.

    DataError names the source that is missing or empty, or says that `out` holds something else.
    """
    out, root, start = Path(recipe.out), Path(recipe.root) if recipe.root else recipe_folder, time.monotonic()
    try:
        evaluation = {name: sha256(root / name) for name in recipe.decontaminate if _exists(root / name)}
        given = [inputs(source, root) for source in recipe.sources]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; check the file and its permissions") from error
    key = _key(FORMAT, _content(recipe), given, evaluation, _versions())
    if out.exists():
        if _manifest_key(out) == key:
            console.print(f"{out} is up to date", soft_wrap=True)
            return out
        raise DataError(f"{out} holds something else than this recipe and its inputs give; delete it, or choose another out")
    with workshop(out) as work, _farewell(console):
        parts = _read(recipe, root, work, given, evaluation, console)
        choices = choose(recipe.sources, parts, near=recipe.near_duplicates, held_out=recipe.held_out, repeat=recipe.repeat,
                         train_bytes=recipe.train_bytes)
        tokenizer = _tokenizer(recipe, root, work, parts, choices, console)
        tokens = _tokenise(recipe, work, parts, choices, tokenizer, console)
        manifest = dict(key=key, format=FORMAT, recipe=_content(recipe), tokenizer=_tokenizer_entry(recipe, tokenizer),
                        evaluation=_evaluation_entry(recipe, root, evaluation), versions=_versions(),
                        sources=[_source_entry(*row) for row in zip(recipe.sources, given, parts, choices, tokens, strict=True)])
        _join(out, tokens, tokenizer, manifest)
    shutil.rmtree(work, ignore_errors=True)
    console.print(f"{time.monotonic() - start:.0f} s in all", soft_wrap=True)
    return out


def _read(recipe: Prepare, root: Path, work: Path, given: list[dict], evaluation: dict, console: Console) -> list[Part]:
    jobs, folders, names = [], [], {}
    for source, content in zip(recipe.sources, given, strict=True):
        reading = Reading(source, root, work / "downloads", recipe.seed, recipe.near_duplicates > 0, recipe.templates,
                          tuple(root / name for name in recipe.decontaminate), recipe.contained)
        settings = dataclasses.asdict(source) | dict(weight=None)  # how much of it is used does not change what is read
        key = _key(FORMAT, settings, recipe.seed, reading.compare, reading.templates, content, evaluation, reading.contained, _versions())
        folder = work / f"read-{key[:16]}"
        folders.append(folder)
        names[folder] = source.path
        if not finished(folder, key):
            jobs.append((folder, read_part, (reading, key)))
    with _bar(console) as bar:
        task = bar.add_task("reading", total=None)
        make_parts(jobs, recipe.workers, lambda folders: bar.update(
            task, description="reading " + ", ".join(names[folder] for folder in folders), completed=sum(map(unfinished_bytes, folders))))
    parts = [Part.open(folder) for folder in folders]
    for source, part in zip(recipe.sources, parts, strict=True):
        dropped = ", ".join(f"{reason} {counts['documents']:,}" for reason, counts in part.summary["dropped"].items())
        console.print(f"{source.path}: {part.summary['documents']:,} documents, {part.summary['bytes'] / 1e6:.2f} MB"
                      + (f" (left out: {dropped})" if dropped else ""), soft_wrap=True)
    return parts


def _tokenizer(recipe: Prepare, root: Path, work: Path, parts: list[Part], choices: list[Choice], console: Console) -> Tokenizer:
    if recipe.tokenizer != "train":
        return Tokenizer.official() if recipe.tokenizer == "official" else Tokenizer.load(root / recipe.tokenizer)
    key = _key(recipe.vocab_size, recipe.tokenizer_bytes, [part.summary["key"] for part in parts], [_mask_key(choice) for choice in choices])
    folder = work / f"tokenizer-{key[:16]}"
    if not folder.exists():
        console.print(f"training a tokenizer of {recipe.vocab_size:,} tokens", soft_wrap=True)
        tokenizer = Tokenizer.train(_sample(parts, choices, recipe.tokenizer_bytes), recipe.vocab_size)
        with _space(), new_folder(folder) as partial:
            tokenizer.save(partial)
    return Tokenizer.load(folder)


def _sample(parts: list[Part], choices: list[Choice], wanted: int) -> Iterator[str]:
    """Pieces of the training documents, of about `wanted` bytes in all, picked by the hash of each document."""
    total = sum(int((part.sizes * choice.copies).sum()) for part, choice in zip(parts, choices, strict=True))
    for part, choice in zip(parts, choices, strict=True):
        for document, digest, copies in zip(part.documents(), part.digests.tolist(), choice.copies.tolist(), strict=True):
            if copies:
                for number, piece in enumerate(corpora.text_pieces(document.text, SAMPLE_PIECE)):
                    if zlib.crc32(b"%d %d" % (digest, number)) < wanted / total * copies * 2**32:
                        yield piece


def _tokenise(recipe: Prepare, work: Path, parts: list[Part], choices: list[Choice], tokenizer: Tokenizer,
              console: Console) -> list[Path]:
    rates = Rates(recipe.seed, recipe.fim_rate, recipe.token_splitting, recipe.long_tokens)
    held_key = _key([part.summary["key"] for part in parts], [_mask_key(choice) for choice in choices]) if recipe.near_duplicates else ""
    held = None
    folders = []
    total = sum(int((part.sizes * (choice.copies + choice.held_out)).sum()) for part, choice in zip(parts, choices, strict=True))
    with _bar(console) as bar:
        task = bar.add_task("tokenising", total=total)
        for source, part, choice in zip(recipe.sources, parts, choices, strict=True):
            key = _key(part.summary["key"], _mask_key(choice), tokenizer.fingerprint, dataclasses.asdict(rates), held_key)
            folders.append(work / f"tokens-{key[:16]}")
            if finished(folders[-1], key):
                bar.advance(task, int((part.sizes * (choice.copies + choice.held_out)).sum()))
                continue
            if held_key and held is None:
                held = Contained.of(_held_texts(recipe.sources, parts, choices))
            tokenise_part(folders[-1], part, choice, tokenizer, rates, None if source.synthetic else held, key,
                          lambda size: bar.advance(task, size))
            console.print(f"tokenised {source.path}", soft_wrap=True)
    return folders


def _held_texts(sources: Sequence[Source], parts: list[Part], choices: list[Choice]) -> Iterator[str]:
    for source, part, choice in zip(sources, parts, choices, strict=True):
        if not source.synthetic:
            yield from (document.text for document, held in zip(part.documents(), choice.held_out.tolist(), strict=True) if held)


def _join(out: Path, tokens: list[Path], tokenizer: Tokenizer, manifest: dict) -> None:
    """The whole corpus from its parts: tokenizer, stores, manifest."""
    with _space(), new_folder(out) as partial:
        (partial / "tokenizer").mkdir()
        tokenizer.save(partial / "tokenizer")
        manifest["files"] = {f"tokenizer/{file.name}": sha256(file) for file in sorted((partial / "tokenizer").iterdir())}
        for name in STORES:
            (partial / name).mkdir()
            with StoreWriter(partial / name, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size) as writer:
                for folder in tokens:
                    writer.extend(folder / name)
                count = writer.finish(key=manifest["key"], fingerprint=tokenizer.fingerprint)
            if not count and name == "long":
                shutil.rmtree(partial / name)
                continue
            if not count:
                raise DataError(f"nothing is left for {name}; add sources, or change the filters")
            manifest["files"][f"{name}/{MANIFEST}"] = sha256(partial / name / MANIFEST)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")


def _source_entry(source: Source, given: dict, part: Part, choice: Choice, tokens: Path) -> dict:
    """What a manifest says of one source."""
    dropped = part.summary["dropped"] | choice.lost.table() | json.loads((tokens / "part.json").read_text(encoding="utf-8"))["dropped"]
    stores = {name: json.loads((tokens / name / MANIFEST).read_text(encoding="utf-8")) for name in STORES}
    counts = {name: {field: store[field] for field in ("documents", "bytes", "tokens")} for name, store in stores.items()}
    licences = sorted({licence for store in stores.values() for licence in store["licences"]})
    return dict(path=source.path, inputs=given, licences=licences, read={field: part.summary[field] for field in ("documents", "bytes")},
                repeated_paragraphs=part.summary["repeated_paragraphs"], dropped=dropped, **counts)


def _tokenizer_entry(recipe: Prepare, tokenizer: Tokenizer) -> dict:
    return dict(made=recipe.tokenizer if recipe.tokenizer in ("train", "official") else "given", vocab_size=tokenizer.vocab_size,
                fingerprint=tokenizer.fingerprint)


def _evaluation_entry(recipe: Prepare, root: Path, evaluation: dict) -> dict:
    known = Contained.of(evaluation_texts(root / name for name in recipe.decontaminate))
    return dict(files=evaluation, texts=len(known.sizes), too_short=known.too_short)


def _content(recipe: Prepare) -> dict:
    """The recipe without what does not change the result: where it lies, and how many processes make it."""
    return {name: value for name, value in dataclasses.asdict(recipe).items() if name not in ("out", "root", "workers")}


def _versions() -> dict[str, str]:
    """Of the packages whose algorithms the bytes depend on."""
    found = {distribution: importlib.metadata.version(distribution) for distribution in ("fathom", "tokenizers", "numpy")}
    for optional in ("rensa", "selectolax"):
        try:
            found[optional] = importlib.metadata.version(optional)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def _mask_key(choice: Choice) -> str:
    return hashlib.sha256(choice.copies.tobytes() + choice.held_out.tobytes()).hexdigest()


def _key(*content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _manifest_key(folder: Path) -> str | None:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _exists(path: Path) -> bool:
    if not path.is_file():
        raise DataError(f"{path} does not exist; check the paths of decontaminate, or --set root=FOLDER")
    return True


def _bar(console: Console) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), console=console,
                    disable=not console.is_terminal, transient=True)


@contextmanager
def _space() -> Iterator[None]:
    """A folder that cannot be written is the user's to know, in one line."""
    try:
        yield
    except CheckpointError as error:
        raise DataError(f"{error}; free some space or choose another out") from error


@contextmanager
def _farewell(console: Console) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on with what is finished", soft_wrap=True)
        raise
