"""The whole of post-training as stages: base, a start on all domains, specialists, one student, comparisons, scores, report (report 5.1).

Every stage is a command of its own in a process of its own, with a recipe that also works alone. A finished stage leaves a marker with
its command and the checksums of what it made; started again, the pipeline runs what is missing and continues what was
stopped.
"""

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path

from rich.console import Console

from fathom import recipe as recipes
from fathom.align.environments.base import EFFORTS, SEEDS, Environment
from fathom.align.pipeline_runner import Runner, StageCommand, add_seconds
from fathom.align.rollout import environments_named
from fathom.data.recall import repeating_texts
from fathom.errors import RecipeError
from fathom.files import alone_in, write_text
from fathom.text import chat
from fathom.text.tokenizer import DSML, EOS, SPECIAL_TOKENS, Tokenizer

EFFORTS_OF_CORPUS = (2, 5, 3)  # how often chat, high and max: without its working, a result is a guess
JUDGING = ("judging", "judged-math")
SECONDS = "seconds"  # of all calls together, from start to end
STUDENTS = ("student", "distilled", "off-policy", "mixed")  # compared with the specialists in every environment
OF_CORPUS = ("environments", "levels", "documents", "repeats", "vocabulary", "seed")  # the fields that decide corpus and tokenizer


@dataclass(frozen=True)
class Size:
    """A model size: its name, its config.json, whether it gets specialists and comparisons of its own, and recipes of its own:
    `NAME.suffix.toml` is taken before NAME.toml. A size without takes the first full size's specialists as its student's teachers. `ranks`
    processes train its base and its start together, since little else can begin before those end.
    """

    name: str
    model: str
    full: bool = True
    ranks: int = 1


@dataclass(frozen=True)
class Pipeline:
    """A pipeline over `environments`. Recipes of the stages (base, specialist, grpo, student, distill, mixed .toml) lie beside the
    pipeline's; one of a stage and environment or size (grpo-agent.toml, base-pro.toml) goes before the general one.

    `documents` worked tasks of each environment (one number, or one for each), as plain text, and `repeats` short texts that repeat themselves
    (a small model learns from them to copy, which every domain needs) join the sources in `text` as the corpus. `teacher_weights` and
    `teacher_shares` (one number, or one for each environment) are those of the teachers in distillation. Scores are of `tasks` held-out
    tasks of each environment and mode; of `claim_tasks`, where that is more, what the report's claims are decided by: specialists at home
    and students everywhere, in high. Thinking `budgets` are scored in those of `budget_environments` that the pipeline has. `judge` adds a
    model that learns to judge, and from its own verdicts.
    """

    run: str
    sizes: tuple[Size, ...]
    environments: tuple[str, ...] = ("math", "code", "agent", "instructions")
    levels: tuple[int, ...] = (1,)
    documents: tuple[int, ...] = (3000,)
    teacher_weights: tuple[float, ...] = (1.0,)
    teacher_shares: tuple[int, ...] = (1,)
    repeats: int = 0
    text: tuple[str, ...] = ()
    vocabulary: int = 2048
    workers: int = 2
    tasks: int = 50
    claim_tasks: int = 0
    score_tokens: int = 256
    temperature: float = 1.0
    budgets: tuple[int, ...] = (8, 16, 32, 64)
    budget_environments: tuple[str, ...] = ("math",)
    judge: bool = False
    seed: int = 0

    def __post_init__(self):
        if not self.sizes or not self.environments or not any(size.full for size in self.sizes):
            raise RecipeError("a pipeline needs environments, and sizes, one of them full")
        for name in ("documents", "teacher_weights", "teacher_shares"):
            if len(getattr(self, name)) not in (1, len(self.environments)):
                raise RecipeError(f"{name} has {len(getattr(self, name))} numbers; give one, or one for each of {len(self.environments)} environments")
        if min(*self.documents, self.workers, self.tasks, self.score_tokens, *(size.ranks for size in self.sizes)) < 1:
            raise RecipeError("documents, workers, tasks, score_tokens and the ranks of sizes must be at least 1")
        if min(self.teacher_weights) <= 0 or min(self.teacher_shares) < 1:
            raise RecipeError(f"teacher_weights is {list(self.teacher_weights)}, teacher_shares {list(self.teacher_shares)}; allowed: above 0, at least 1")
        if self.repeats < 0:
            raise RecipeError(f"repeats is {self.repeats}; allowed: 0 or more texts")

    @property
    def teachers_size(self) -> str:
        """The size whose specialists teach where a size has none of its own."""
        return next(size.name for size in self.sizes if size.full)


def run_pipeline(recipe: Pipeline, root: Path, known: Mapping[str, Environment], report: Callable[[Pipeline], Path], console: Console) -> Path:
    """Run what is missing and write the report; its path. KeyboardInterrupt after Ctrl-C or SIGTERM, with every stage stopped and saved.
    InputError for an environment that does not exist.
    """
    run, planned = Path(recipe.run), stages(recipe, root)
    environments_named((*recipe.environments, *recipe.budget_environments), known)
    with alone_in(run):
        began = time.monotonic()
        write_text(run / "recipe.toml", recipes.dump(recipe))
        try:
            prepare_corpus(recipe, root, known, console)
            Runner(run, planned, recipe.workers, console).run()
        finally:
            add_seconds(run / SECONDS, time.monotonic() - began)
        return report(recipe)


def stages(recipe: Pipeline, root: Path) -> list[StageCommand]:
    """All stages, each after those that it needs and before its own scores; what can begin at the same time in the order to begin it in.
    Specialists begin where the student does, after its fine-tuning on all domains.
    """
    run, found = Path(recipe.run), []

    def toml(*names: str) -> str:
        path = next((root / f"{name}.toml" for name in names if (root / f"{name}.toml").is_file()), None)
        if path is None:
            raise RecipeError(f"{root / names[-1]}.toml is missing; the pipeline needs a recipe for this stage")
        return str(path)

    def add(name: str, verb: str, recipe_file: str, after: Sequence[str], reads: Sequence[str] = (), ranks: int = 1, **fields: object) -> str:
        settings = {"run": str(run / name)} | fields
        sets = [part for key, value in settings.items() for part in ("--set", f"{key.replace('__', '.')}={_toml(value)}")]
        found.append(StageCommand(name, (verb, recipe_file, *sets), tuple(after), run / name, tuple(map(Path, reads)), ranks))
        return name

    sources = [str((run / "corpus.jsonl").resolve()), *(str((root / path).resolve()) for path in recipe.text)]
    tokenizer = (run / "tokenizer").resolve()
    for size in recipe.sizes:
        s = size.name
        model = str((root / size.model).resolve())
        base = add(f"{s}/base", "train", toml(f"base-{s}", "base"), (), [*sources, str(tokenizer / "tokenizer.json"), model], model=model,
                   data__sources=sources, data__tokenizer=str(tokenizer), ranks=size.ranks, parallel__data=size.ranks)
        student = add(f"{s}/student", "sft", toml(f"student-{s}", "student"), [base], base=str(run / base), ranks=size.ranks,
                      parallel__data=size.ranks, demonstrations__environments=list(recipe.environments))
        specialists = {}
        for name in recipe.environments if size.full else ():
            started = add(f"{s}/sft-{name}", "sft", toml(f"specialist-{name}", f"specialist-{s}", "specialist"), [student],
                          base=str(run / student), demonstrations__environments=[name])
            specialists[name] = add(f"{s}/grpo-{name}", "grpo", toml(f"grpo-{name}", f"grpo-{s}", "grpo"), [started],
                                    base=str(run / started), environments=[name])
        taught_by = {name: specialists.get(name, f"{recipe.teachers_size}/grpo-{name}") for name in recipe.environments}
        teachers = [{"run": str(run / taught_by[name]), "environments": [name], "weight": weight, "share": share}
                    for name, weight, share in zip(recipe.environments, cycle(recipe.teacher_weights), cycle(recipe.teacher_shares), strict=False)]
        after = [student, *taught_by.values()]
        add(f"{s}/distilled", "distill", toml(f"distill-{s}", "distill"), after, base=str(run / student), teachers=teachers)
        if size.full:
            add(f"{s}/off-policy", "distill", toml("off-policy", f"distill-{s}", "distill"), after, base=str(run / student), teachers=teachers,
                samples="teachers")
            add(f"{s}/mixed", "grpo", toml(f"mixed-{s}", "mixed"), [student], base=str(run / student), environments=list(recipe.environments))
            if recipe.judge:
                started = add(f"{s}/sft-judge", "sft", toml("specialist-judge", f"specialist-{s}", "specialist"), [student], base=str(run / student),
                              demonstrations__environments=[*JUDGING], demonstrations__careless=0.0)
                add(f"{s}/judge", "grpo", toml("grpo-judge", f"grpo-{s}", "grpo"), [started], base=str(run / started), environments=[*JUDGING])
            paths = [str(run / stage) for stage in specialists.values()]
            found.append(StageCommand(f"{s}/average", ("average", *paths, "--out", str(run / s / "average")),
                                      tuple(specialists.values()), run / s / "average"))
    return [entry for stage in found for entry in (stage, *_scores(recipe, stage))]


def _scores(recipe: Pipeline, stage: StageCommand) -> list[StageCommand]:
    """The scores of what a stage made: the distilled model in every mode, others in chat and high; with more tasks what claims are decided by;
    and the distilled model's against thinking budgets.
    """
    run, (size, model) = Path(recipe.run), stage.name.split("/")
    whole, file = model == "distilled", f"{size}.{model}.json"

    def score(kind: str, environments: Sequence[str], modes: str, tasks: int, folder: str, *more: str) -> StageCommand:
        out = run / folder / file
        return StageCommand(f"{kind}/{stage.name}", (
            "score", str(stage.makes), "--environment", ",".join(environments), "--tasks", str(tasks), "--mode", modes,
            "--levels", ",".join(map(str, recipe.levels)), "--max-tokens", str(recipe.score_tokens), "--temperature", str(recipe.temperature),
            "--seed", str(recipe.seed), "--out", str(out), *more), (stage.name,), out)

    names = JUDGING if "judge" in model else recipe.environments
    at_home = [name for name in recipe.environments if model in (f"sft-{name}", f"grpo-{name}")]
    claimed = at_home or (list(recipe.environments) if model in STUDENTS else [])
    if recipe.claim_tasks <= recipe.tasks or size != recipe.teachers_size:
        claimed = []
    modes = ["chat", *(["high"] if claimed != list(recipe.environments) else []), *(["max"] if whole else [])]  # high once, with more tasks
    found = [score("score", names, ",".join(modes), recipe.tasks, "scores")]
    if claimed:
        found.append(score("claim", claimed, "high", recipe.claim_tasks, "claims"))
    thinking = [name for name in recipe.budget_environments if name in recipe.environments]
    if whole and recipe.budgets and thinking:
        found.append(score("budgets", thinking, "high,max", recipe.tasks, "budgets", "--budgets", ",".join(map(str, recipe.budgets))))
    return found


def prepare_corpus(recipe: Pipeline, root: Path, known: Mapping[str, Environment], console: Console) -> None:
    """Write `corpus.jsonl`, worked tasks of the training side as plain text, and the tokenizer that all sizes share.

    What is the same in all tasks the tokenizer sees and the corpus leaves out: the tools' descriptions of a domain, the instruction of the
    effort "max", which would be a fifth of all tokens or more. What a recipe that says the same wrote before is kept.
    """
    run = Path(recipe.run)
    marker, key = run / "corpus.json", json.dumps({name: getattr(recipe, name) for name in OF_CORPUS}, indent=2) + "\n"
    if marker.is_file() and marker.read_text(encoding="utf-8") == key:
        return
    rows, descriptions, rng = [], [], random.Random(f"{recipe.seed}/corpus")
    counts = recipe.documents * (len(recipe.environments) // len(recipe.documents))
    for name, count in zip(recipe.environments, counts, strict=True):
        levels = [level for level in recipe.levels if level in known[name].levels] or [known[name].levels[0]]
        for _ in range(count):
            task = known[name].task(rng.randrange(SEEDS), "train", rng.choice(levels))
            effort = rng.choices([*EFFORTS], EFFORTS_OF_CORPUS)[0]
            thinking_mode, reasoning_effort = EFFORTS[effort]
            asked = [message for message in task.messages if not message.get("tools")]
            worked = plain_text(asked + known[name].demonstration(task, effort), thinking_mode)
            rows.append({"text": worked, "source": name, "licence": "MIT"})
            if len(asked) < len(task.messages):
                descriptions.append(plain_text(task.messages, thinking_mode, reasoning_effort))
    rows += [{"text": text, "source": "repeats", "licence": "CC0-1.0"} for text in islice(repeating_texts(recipe.seed), recipe.repeats)]
    rng.shuffle(rows)
    write_text(run / "corpus.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    Tokenizer.train(chain(descriptions, (row["text"] for row in rows)), recipe.vocabulary).save(run / "tokenizer")
    write_text(marker, key)
    console.print(f"corpus: {len(rows) - recipe.repeats:,} worked tasks, {recipe.repeats:,} texts to copy from, "
                  f"a tokenizer of {recipe.vocabulary:,} tokens", soft_wrap=True)


def plain_text(messages: list[dict], thinking_mode: str, reasoning_effort: str | None = None) -> str:
    """A conversation without the chat format's special tokens: paragraphs, as a text on the same matter would have them."""
    text = chat.encode(messages, thinking_mode, reasoning_effort, drop_thinking=False)
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "\n\n" if token == EOS else "" if token == DSML else "\n")
    return text.strip()


def _toml(value: object) -> str:
    """A value for --set."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
