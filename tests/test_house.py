"""The layout holds: floors, cycles, sizes, docstrings, no machine's paths, no command in the docs that does not exist.

Each rule is a function from sources to a list of problems, so that the rules themselves are tested on bad sources.
"""

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module imports only from lower floors, or from its own room.
FLOORS = {
    "errors": 0, "config": 1, "recipe": 1, "files": 1, "signals": 1, "memory": 1, "devices": 1, "cluster": 1, "accounting": 2, "text": 2, "quant": 2, "ops": 3, "model": 4,
    "checkpoint": 5, "optim": 5, "data": 5, "engine": 6, "evals": 7, "train": 8, "align": 9, "server": 10, "lab": 10,
    "cli": 11}
LAZY = ("fathom", "cli")  # the package itself and a room: may import inside functions, so that `import fathom` and `fathom --help` are instant
FILE_LINES, FUNCTION_LINES = 400, 60
BUDGETS = {"fathom": 33_150, "fathom.model": 1_500, "fathom.engine": 3_200}
OUTSIDE_BUDGET = {"fathom.model": "fathom.model.baselines"}
SHAPE = re.compile(r"\[(\.\.\.|[A-Z])[^\]]*\]|_[A-Z]+\d?\b")  # [B, S, W] or a suffix as in q_BSHD
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
MACHINE_PATH = re.compile(r"(?<![\w.])(/(work|root|home|Users)/\w|[A-Z]:\\Users\\)")
COMMAND = re.compile(  # at the start of a shell command: fathom VERB [WORD]
    r"(?:^|&&|\|\||[;|`(])[ \t]*(?:\$ )?(?:\w+=\S+ )*(?:[\w./-]*/)?fathom[ \t]+([a-z][\w-]*)(?:[ \t]+([a-z][\w-]*))?",
    re.MULTILINE)


class Module(NamedTuple):
    name: str
    source: str
    tree: ast.Module


class Import(NamedTuple):
    line: int
    target: str
    inside: bool  # in a function or class
    relative: bool


def parse(sources: dict[str, str]) -> dict[str, Module]:
    """Modules by dotted name, from sources by path relative to the repository."""
    modules = {}
    for path, source in sources.items():
        parts = path.removesuffix(".py").split("/")
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(name, source, ast.parse(source, path))
    return modules


def read_house() -> dict[str, Module]:
    return parse({path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
                  for path in sorted((ROOT / "fathom").rglob("*.py"))})


def imports(module: Module, names: Iterable[str]) -> Iterator[Import]:
    """Every import; `from package import x` means the module package.x where there is one among `names`."""
    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(child.lineno, alias.name, inside, False) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    inner = f"{child.module}.{alias.name}"
                    yield Import(child.lineno, inner if inner in names else child.module or "", inside, child.level > 0)
            scopes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
            yield from visit(child, inside or isinstance(child, scopes))

    return visit(module.tree, False)


def room(name: str) -> str:
    return (name.split(".") + [""])[1]


def inside_package(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def lazy(name: str) -> bool:
    return name in LAZY or room(name) in LAZY


def import_problems(modules: dict[str, Module]) -> list[str]:
    problems = []
    for module in modules.values():
        if module.name != "fathom" and room(module.name) not in FLOORS:
            problems.append(f"{module.name}: the room {room(module.name)!r} has no floor")
        for found in imports(module, modules):
            where = f"{module.name}:{found.line}"
            if found.relative:
                problems.append(f"{where}: relative import")
            elif found.inside and not lazy(module.name):
                problems.append(f"{where}: import of {found.target} inside a function or class")
            elif inside_package(found.target, "fathom"):
                problems += [f"{where}: {text}" for text in internal_problems(module.name, found.target, modules)]
        for node in ast.walk(module.tree):
            name = getattr(node, "id", getattr(node, "attr", None))
            if name in ("import_module", "__import__") and not lazy(module.name):
                problems.append(f"{module.name}:{node.lineno}: dynamic import")
            if name == "TYPE_CHECKING":
                problems.append(f"{module.name}:{node.lineno}: type-only import")
    return problems


def internal_problems(name: str, target: str, modules: dict[str, Module]) -> Iterator[str]:
    if target not in modules:
        yield f"{target} does not exist"
    elif target == "fathom":
        yield "imports the package's public face"
    elif name != "fathom":
        own, other = room(name), room(target)
        if own != other and FLOORS.get(other, 99) >= FLOORS.get(own, 0):
            yield f"{own} (floor {FLOORS.get(own)}) imports {target} (floor {FLOORS.get(other)})"
        if own == "model" and target.startswith("fathom.ops."):
            yield f"model/ imports {target}, not fathom.ops"


def cycles(modules: dict[str, Module]) -> list[str]:
    edges = {module.name: sorted({found.target for found in imports(module, modules) if found.target in modules})
             for module in modules.values()}
    problems, done = [], set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            problems.append(" -> ".join(path[path.index(name):] + (name,)))
        elif name not in done:
            for target in edges[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())
    return problems


def lines(source: str) -> int:
    return len(source.splitlines())


def size_problems(modules: dict[str, Module]) -> list[str]:
    problems = [f"{module.name}: {lines(module.source)} lines, allowed {FILE_LINES}"
                for module in modules.values() if lines(module.source) > FILE_LINES]
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION_LINES:
                    problems.append(f"{module.name}.{node.name}: {length} lines, allowed {FUNCTION_LINES}")
    for package, allowed in BUDGETS.items():
        outside = OUTSIDE_BUDGET.get(package)
        total = sum(lines(module.source) for module in modules.values() if inside_package(module.name, package)
                    and not (outside and inside_package(module.name, outside)))
        if total > allowed:
            problems.append(f"{package}: {total} lines, allowed {allowed}")
    return problems


def docstring_problems(modules: dict[str, Module]) -> list[str]:
    problems = [f"{module.name}: no docstring" for module in modules.values() if not ast.get_docstring(module.tree)]
    for module in modules.values():
        for node in module.tree.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            text = ast.get_docstring(node)
            if not text and module.name != "fathom":
                problems.append(f"{module.name}.{node.name}: no docstring")
            elif room(module.name) == "ops" and needs_shapes(node) and not SHAPE.search(text):
                problems.append(f"{module.name}.{node.name}: its docstring names no shape")
    return problems


def needs_shapes(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether it is a function of tensors, other than an implementation, which has its definition's shapes."""
    if isinstance(node, ast.ClassDef) or any(".register(" in ast.unparse(mark) for mark in node.decorator_list):
        return False
    hints = [*(argument.annotation for argument in ast.walk(node.args) if isinstance(argument, ast.arg)), node.returns]
    return any("Tensor" in ast.unparse(hint) for hint in hints if hint)


def unfinished_problems(modules: dict[str, Module]) -> list[str]:
    return [f"{module.name}:{number}: {line.strip()}" for module in modules.values()
            for number, line in enumerate(module.source.splitlines(), 1) if UNFINISHED.search(line)]


def path_problems(texts: dict[str, str]) -> list[str]:
    return [f"{name}:{number}: {line.strip()[:100]}" for name, text in texts.items()
            for number, line in enumerate(text.splitlines(), 1) if MACHINE_PATH.search(line)]


def repository_texts() -> dict[str, str]:
    """Every text file that is or could be committed; without git, every one that is not hidden or built."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True)
    names = listed.stdout.decode().split("\0") if listed.returncode == 0 else [
        path.relative_to(ROOT).as_posix() for folder in ("fathom", "tests", "docs", "recipes", "scripts", "benchmarks")
        for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    texts = {}
    for name in filter(None, names):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        try:
            texts |= {} if b"\0" in content else {name: content.decode()}
        except UnicodeDecodeError:
            pass  # not a text
    return texts


def commands(trees: Iterable[ast.Module]) -> set[str]:
    """The command line's verbs, "data prepare" for a verb in a group, from `@app.command(...)` and `add_typer`."""
    groups, nodes = {}, [node for tree in trees for node in ast.walk(tree)]
    for node in nodes:
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_typer":
            name = next(keyword.value.value for keyword in node.keywords if keyword.arg == "name")
            groups[node.args[0].id] = name + " "
    found = set()
    for node in nodes:
        for call in getattr(node, "decorator_list", []):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "command":
                given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "name")]
                verb = given[0].value if given else node.name.strip("_").replace("_", "-")
                found.add(groups.get(call.func.value.id, "") + verb)
    return found


def command_problems(texts: dict[str, str], known: set[str]) -> list[str]:
    """`fathom VERB` in fenced blocks and inline code, where the verb does not exist."""
    problems = []
    for name, text in texts.items():
        fenced = re.findall(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```", text, re.MULTILINE | re.DOTALL)
        inline = re.findall(r"`[^`\n]+`", re.sub(r"^[ \t]*```.*?^[ \t]*```", "", text, flags=re.MULTILINE | re.DOTALL))
        for code in [*fenced, *inline]:
            problems += [f"{name}: fathom {verb} {word}".rstrip() for verb, word in COMMAND.findall(code)
                         if verb not in known and f"{verb} {word}" not in known]
    return problems


# ---- the house as it stands

HOUSE = read_house()


@pytest.mark.parametrize("rule", [import_problems, cycles, size_problems, docstring_problems, unfinished_problems])
def test_the_house_follows(rule):
    problems = rule(HOUSE)
    assert HOUSE and not problems, "\n".join(problems)


def test_no_file_names_a_machines_paths():
    texts = repository_texts()
    assert "fathom/errors.py" in texts
    problems = path_problems(texts)
    assert not problems, "\n".join(problems)


def test_commands_in_the_docs_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    texts = {page.name: page.read_text(encoding="utf-8") for page in pages if page.exists()}
    known = commands(module.tree for module in HOUSE.values() if room(module.name) == "cli")
    problems = command_problems(texts, known)
    assert known and not problems, "\n".join(problems)


# ---- the rules bite

GOOD = '"""Doc."""\n'


def with_errors(sources: dict[str, str]) -> dict[str, Module]:
    return parse({"fathom/errors.py": GOOD} | sources)


@pytest.mark.parametrize("path, line, expected", [
    ("fathom/ops/x.py", "from fathom.model.y import z", "ops (floor 3) imports fathom.model.y (floor 4)"),
    ("fathom/data/x.py", "from fathom.optim import z", "data (floor 5) imports fathom.optim (floor 5)"),
    ("fathom/data/x.py", "import fathom.optim", "data (floor 5) imports fathom.optim (floor 5)"),
    ("fathom/data/x.py", "from fathom import optim", "data (floor 5) imports fathom.optim (floor 5)"),
    ("fathom/data/x.py", "from fathom import load_model", "public face"),
    ("fathom/data/x.py", "from .store import z", "relative import"),
    ("fathom/data/x.py", "from . import store", "relative import"),
    ("fathom/data/x.py", "def f():\n    import json", "import of json inside"),
    ("fathom/data/x.py", "class C:\n    from fathom.errors import DataError", "import of fathom.errors inside"),
    ("fathom/data/x.py", "import importlib\nimportlib.import_module('json')", "dynamic import"),
    ("fathom/data/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import json", "type-only import"),
    ("fathom/data/x.py", "from fathom.nowhere import z", "fathom.nowhere does not exist"),
    ("fathom/model/x.py", "from fathom.ops.y import z", "model/ imports fathom.ops.y, not fathom.ops"),
    ("fathom/model/baselines/x.py", "from fathom.ops import y", "model/ imports fathom.ops.y, not fathom.ops"),
    ("fathom/errors.py", "import fathom.config", "errors (floor 0) imports fathom.config"),
    ("fathom/attic/x.py", "import json", "the room 'attic' has no floor"),
])
def test_a_forbidden_import_is_found(path, line, expected):
    others = {f"fathom/{name}.py": GOOD for name in ("config", "ops/__init__", "ops/y", "model/y", "optim/__init__")}
    problems = import_problems(with_errors({"fathom/__init__.py": GOOD} | others | {path: GOOD + line}))
    assert len(problems) == 1 and expected in problems[0]


@pytest.mark.parametrize("path, line", [
    ("fathom/data/x.py", "try:\n    import pyarrow\nexcept ImportError:\n    pyarrow = None"),
    ("fathom/data/x.py", "from fathom.errors import DataError\nfrom fathom.data.y import z\nfrom fathom import ops"),
    ("fathom/model/x.py", "from fathom import ops\nfrom fathom.ops import Window"),
    ("fathom/cli.py", "def f():\n    from fathom.data.y import z"),
    ("fathom/__init__.py", "def f():\n    import importlib\n    importlib.import_module('fathom.data')"),
])
def test_an_allowed_import_is_not_found(path, line):
    others = {"fathom/ops/__init__.py": GOOD, "fathom/data/y.py": GOOD}
    assert import_problems(with_errors(others | {path: GOOD + line})) == []


def test_a_cycle_is_found_in_a_room_and_a_package_may_gather_its_modules():
    gathered = {"fathom/ops/__init__.py": "from fathom.ops.a import x", "fathom/ops/a.py": "from fathom.ops.b import y",
                "fathom/ops/b.py": ""}
    assert cycles(parse(gathered)) == []
    assert cycles(parse(gathered | {"fathom/ops/b.py": "from fathom.ops.a import x"})) == [
        "fathom.ops.a -> fathom.ops.b -> fathom.ops.a"]
    assert cycles(parse(gathered | {"fathom/ops/b.py": "from fathom.ops import x"})) == [
        "fathom.ops -> fathom.ops.a -> fathom.ops.b -> fathom.ops"]


def test_sizes_are_counted():
    body = "def f():\n" + "    x = 1\n" * 60
    assert size_problems(parse({"fathom/data/x.py": body})) == ["fathom.data.x.f: 61 lines, allowed 60"]
    assert size_problems(parse({"fathom/data/x.py": f"class C:\n    async {body}".replace("\n    x", "\n        x")}))
    assert size_problems(parse({"fathom/data/x.py": "x = 1\n" * 401})) == ["fathom.data.x: 401 lines, allowed 400"]
    model = {f"fathom/model/x{i}.py": "x = 1\n" * 400 for i in range(4)}
    assert size_problems(parse(model)) == ["fathom.model: 1600 lines, allowed 1500"]
    baselines = {path.replace("model/", "model/baselines/"): text for path, text in model.items()}
    assert size_problems(parse(baselines)) == []
    many = {f"fathom/lab/x{i}.py": "x = 1\n" * 400 for i in range(83)}
    assert size_problems(parse(many)) == ["fathom: 33200 lines, allowed 33150"]


@pytest.mark.parametrize("path, source, expected", [
    ("fathom/data/x.py", "x = 1", "fathom.data.x: no docstring"),
    ("fathom/data/x.py", GOOD + "def f(): ...", "fathom.data.x.f: no docstring"),
    ("fathom/data/x.py", GOOD + "class C: ...", "fathom.data.x.C: no docstring"),
    ("fathom/ops/x.py", GOOD + "@op\ndef f(x: Tensor):\n    'Sum.'", "fathom.ops.x.f: its docstring names no shape"),
    ("fathom/ops/x.py", GOOD + "def f(n) -> Tensor:\n    'A [b]'", "fathom.ops.x.f: its docstring names no shape"),
])
def test_a_missing_docstring_or_shape_is_found(path, source, expected):
    assert docstring_problems(parse({path: source})) == [expected]


@pytest.mark.parametrize("source", [
    "def f(x: Tensor):\n    'Sum [B, S, W].'", "def f(x: Tensor):\n    'Sum over q_BSHD.'",
    "def f(x: Tensor):\n    '`x` [...] in float32.'", "def f(n: int):\n    'Half.'",
    "@f.register('cpu')\ndef f_cpu(x: Tensor):\n    'Faster.'",
])
def test_shapes_are_recognised_and_not_asked_of_numbers_or_implementations(source):
    assert docstring_problems(parse({"fathom/ops/x.py": GOOD + source})) == []


def test_unfinished_work_is_found():
    assert unfinished_problems(parse({"fathom/data/x.py": "# TODO later"})) == ["fathom.data.x:1: # TODO later"]
    assert unfinished_problems(parse({"fathom/data/x.py": "raise NotImplementedError"}))


@pytest.mark.parametrize("folder", ["work", "root", "home", "Users"])
def test_machine_paths_are_found(folder):
    assert path_problems({"a.md": f"one\nsee /{folder}/me/x"}) == [f"a.md:2: see /{folder}/me/x"]
    assert path_problems({"a.md": f"https://example.org/{folder}/page and fathom/{folder}/x"}) == []


CLI = """
app = typer.Typer()
data = typer.Typer()
app.add_typer(data, name="data")
@app.command()
def train(recipe): ...
@app.command("chat", help="Talk.")
def chat_(path): ...
@data.command()
def prepare(path): ...
def helper(): ...
"""


def test_verbs_are_read_from_the_command_line():
    assert commands([ast.parse(CLI)]) == {"train", "chat", "data prepare"}


@pytest.mark.parametrize("text, verb", [
    ("```bash\nfathom trian recipes/a.toml\n```", "trian recipes"),
    ("```\n$ fathom data clean x\n```", "data clean"),
    ("```\nCUDA=0 .venv/bin/fathom serve\n```", "serve"),
    ("```\ncd x && fathom explain\n```", "explain"),
    ("run `fathom grpo RECIPE` then", "grpo"),
    ("- item\n  ```\n  fathom nope\n  ```", "nope"),
])
def test_a_command_that_does_not_exist_is_found(text, verb):
    assert command_problems({"a.md": text}, commands([ast.parse(CLI)])) == [f"a.md: fathom {verb}"]


@pytest.mark.parametrize("text", [
    "```\nfathom train recipes/a.toml\nfathom data prepare x\n```", "`fathom chat runs/a`", "fathom is a system",
    "```python\nfrom fathom import load_model\nimport fathom\n```", "```\npip install fathom && fathom --help\n```",
])
def test_commands_that_exist_and_prose_are_left_alone(text):
    assert command_problems({"a.md": text}, commands([ast.parse(CLI)])) == []
