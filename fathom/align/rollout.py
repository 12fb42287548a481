"""Groups of rollouts through the engine: all prompts of a round together, a group's members sharing their prompt.

Multi-turn episodes go on with what the environment answered, all reasoning kept; a thinking budget ends the reasoning of a turn. What a
log holds already is not sampled again: an episode goes on from its last token, with the random numbers it would have drawn, because
starting afresh would favour short answers (report 5.2.3).
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from fathom.align.environments.base import Environment, Score, Task
from fathom.align.rollout_log import RolloutLog
from fathom.align.sample import Mode, Rollout, following_ids, prompt_ids
from fathom.engine.engine import Engine
from fathom.engine.request import MOST_CHOICES, Request
from fathom.engine.sampler import Sampling
from fathom.engine.settings import EngineSettings
from fathom.errors import InputError, RecipeError
from fathom.model.transformer import Transformer
from fathom.text.chat_stream import read_answer
from fathom.text.tokenizer import THINK_END, Tokenizer

# Plays the rollouts of a round with the model as it is, and says how long that took: play_here, or one that has others do it.
Play = Callable[[Transformer, Tokenizer, Sequence[Rollout], Mapping[str, Environment], "Draw", int, RolloutLog | None], dict[str, float]]

SCORERS = 2  # threads: code is tried in processes of its own


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn in rollouts, and what the engine may use. The report samples at temperature 1."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    running: int = 64
    cache_mib: int = 256

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.running < 1 or self.cache_mib < 1:
            raise RecipeError(f"draw: {self}; allowed: temperature and top_k from 0, top_p above 0 up to 1, running and cache_mib at least 1")

    @property
    def filters(self) -> bool:
        """Whether unlikely tokens are left out."""
        return self.top_k > 0 or self.top_p < 1


def new_engine(model: Transformer, tokenizer: Tokenizer, draw: Draw, waiting: int) -> Engine:
    """An engine over the model as it is now: of earlier weights nothing is kept, so a new one is how weights are synchronised."""
    settings = EngineSettings(cache_bytes=draw.cache_mib << 20, running=draw.running, waiting=max(waiting, 1), state_bytes=16 << 20)
    return Engine(model, tokenizer, settings=settings)


def new_rollouts(tasks: Sequence[tuple[Task, Mode]], members: int, tokenizer: Tokenizer) -> list[Rollout]:
    """`members` rollouts of each task, group after group."""
    rollouts = []
    for group, (task, mode) in enumerate(tasks):
        ids = prompt_ids(task, mode.effort, [], tokenizer)
        rollouts += [Rollout(task, mode, group, member, [*ids]) for member in range(members)]
    return rollouts


def play(engine: Engine, rollouts: Sequence[Rollout], environments: Mapping[str, Environment], draw: Draw, seed: int,
         log: RolloutLog | None = None) -> None:
    """Play all rollouts to their end and score them. What `log` found is taken over; everything new is written to it first."""
    player = Player(engine, rollouts, environments, draw, seed, log)
    player.replay()
    player.run()


def play_here(model: Transformer, tokenizer: Tokenizer, rollouts: Sequence[Rollout], environments: Mapping[str, Environment], draw: Draw,
              seed: int, log: RolloutLog | None) -> dict[str, float]:
    """Play rollouts in this process with the model as it is; how long the engine took to take the weights over, and how fast it sampled."""
    training, began = model.training, time.monotonic()
    engine = new_engine(model, tokenizer, draw, len(rollouts))
    synchronised = time.monotonic()
    play(engine, rollouts, environments, draw, seed, log)
    seconds = time.monotonic() - synchronised
    engine.close()
    model.train(training)
    return {"sync_seconds": synchronised - began, "sample_seconds": seconds,
            "sampled_tokens_per_second": engine.stats().generated_tokens / max(seconds, 1e-9)}


class Player:
    """Plays the rollouts of one round. Whatever decides how an episode goes on is read off its tokens, live and from a log alike."""

    def __init__(self, engine: Engine, rollouts: Sequence[Rollout], environments: Mapping[str, Environment], draw: Draw, seed: int,
                 log: RolloutLog | None):
        self.engine, self.rollouts, self.environments, self.draw, self.seed, self.log = engine, rollouts, environments, draw, seed, log
        self.tokenizer = engine.tokenizer
        self._end, self._think_end = engine.config.eos_token_id, engine.tokenizer.special_ids[THINK_END]
        self._index = {rollout: number for number, rollout in enumerate(rollouts)}
        self._phase = [0] * len(rollouts)  # requests of a rollout that are over
        self._phase_start = [len(rollout.tokens) for rollout in rollouts]
        self._asked: dict[tuple[int, int], Rollout] = {}  # by request and choice
        self._scores: dict[Rollout, Future[Score]] = {}

    def replay(self) -> None:
        """Take over what the log holds."""
        for kind, *values in self.log.found if self.log is not None else ():
            if kind == "written":
                for number, token, logprob in values[0]:
                    self._write(self.rollouts[number], token, logprob)
            elif kind == "given":
                number, tokens, results = values
                self._give(self.rollouts[number], tokens, results)
            elif kind == "scored":
                number, finish, score = values
                self._finish(self.rollouts[number], finish)
                self.rollouts[number].score = Score(**score)

    def run(self) -> None:
        """Play on until every rollout has its score."""
        with ThreadPoolExecutor(SCORERS) as pool:
            self._pool = pool
            self._ask_groups()
            while self.engine.has_work:
                self._step()
            for rollout, score in self._scores.items():
                rollout.score = score.result()
                self._record("scored", self._index[rollout], rollout.finish, vars(rollout.score))

    def _ask_groups(self) -> None:
        """Ask for everything that is open; untouched members of a group together."""
        groups: dict[int, list[Rollout]] = {}
        for rollout in self.rollouts:
            touched = rollout.count or rollout.finish or self._phase[self._index[rollout]]
            if touched or rollout.mode.thinking_budget == 0 or self._room(rollout) <= 0:
                self._go_on(rollout)
            else:
                groups.setdefault(rollout.group, []).append(rollout)
        for members in groups.values():
            runs: list[list[Rollout]] = []
            for rollout in members:  # choices are numbered without gaps
                gap = not runs or rollout.member != runs[-1][-1].member + 1 or len(runs[-1]) == MOST_CHOICES
                runs.append([rollout]) if gap else runs[-1].append(rollout)
            for run in runs:
                self._ask(run)

    def _step(self) -> None:
        outputs = self.engine.step()
        written = [(self._asked[output.request, output.choice], token.token, round(token.logprob, 5))
                   for output in outputs for token in output.tokens]
        if written:
            self._record("written", [(self._index[rollout], token, logprob) for rollout, token, logprob in written])
        for rollout, token, logprob in written:
            self._write(rollout, token, logprob)
        for output in outputs:
            if output.finish is not None:
                self._go_on(self._asked.pop((output.request, output.choice)))

    def _go_on(self, rollout: Rollout) -> None:
        """Ask for more tokens, after whatever else happens before."""
        while rollout.score is None and rollout.finish is None:
            budget, room = rollout.mode.thinking_budget, self._room(rollout)
            if rollout.written[-1] and rollout.tokens[-1] == self._end:
                self._end_turn(rollout)
            elif room <= 0:
                self._finish(rollout, "length")
            elif self._reasons(rollout) and len(rollout.tokens) - rollout.turn_start >= budget:
                self._give_recorded(rollout, [self._think_end], None)
            else:
                self._ask([rollout])
                return
        if rollout.score is None:
            environment = self.environments[rollout.task.domain]
            self._scores[rollout] = self._pool.submit(environment.score, rollout.task, rollout.turns)

    def _ask(self, rollouts: Sequence[Rollout]) -> None:
        """Have tokens written for rollouts with the same tokens and successive members."""
        first = rollouts[0]
        number, limit, stops = self._index[first], self._room(first), ()
        if self._reasons(first):
            limit, stops = min(limit, first.mode.thinking_budget - (len(first.tokens) - first.turn_start)), (self._think_end,)
        sampling = Sampling(self.draw.temperature, self.draw.top_p, _seed(self.seed, first.group, self._phase[number]), limit,
                            top_k=self.draw.top_k, stop_ids=stops, logprobs=0, drawn=len(first.tokens) - self._phase_start[number])
        request = self.engine.add(Request(tuple(first.tokens), sampling, len(rollouts), first_choice=first.member))
        self._asked |= {(request, rollout.member): rollout for rollout in rollouts}

    def _room(self, rollout: Rollout) -> int:
        return min(rollout.mode.tokens - rollout.count, self.engine.max_tokens - 1 - len(rollout.tokens))

    def _reasons(self, rollout: Rollout) -> bool:
        """Whether it is in the part of its turn that a thinking budget bounds."""
        limited = rollout.mode.thinking and rollout.mode.thinking_budget is not None
        return limited and self._think_end not in rollout.tokens[rollout.turn_start:]

    def _write(self, rollout: Rollout, token: int, logprob: float) -> None:
        ends_phase = token == self._think_end and self._reasons(rollout)
        rollout.write(token, logprob)
        if ends_phase:
            self._next_phase(rollout)

    def _give(self, rollout: Rollout, tokens: Sequence[int], results: list[dict] | None) -> None:
        """Tokens that the model did not choose: a closed reasoning, or the environment's `results` after the turn."""
        if results is not None:
            rollout.turns += [self._read_turn(rollout), *results]
        rollout.give(tokens)
        if results is not None:
            rollout.turn_start = len(rollout.tokens)
        self._next_phase(rollout)

    def _give_recorded(self, rollout: Rollout, tokens: Sequence[int], results: list[dict] | None) -> None:
        self._record("given", self._index[rollout], tokens, results)
        self._give(rollout, tokens, results)

    def _end_turn(self, rollout: Rollout) -> None:
        turns = [*rollout.turns, self._read_turn(rollout)]
        results = self.environments[rollout.task.domain].step(rollout.task, turns)
        if results is None:
            self._finish(rollout, "stop")
        else:
            ids = following_ids(rollout.task, rollout.mode.effort, turns, results, self.tokenizer)
            self._give_recorded(rollout, ids, results)

    def _finish(self, rollout: Rollout, finish: str) -> None:
        turn = self._read_turn(rollout)
        rollout.turns.append(turn if finish == "stop" else turn | {"wo_eos": True})
        rollout.finish = finish

    def _read_turn(self, rollout: Rollout) -> dict:
        text = self.tokenizer.decode(rollout.tokens[rollout.turn_start:])
        return read_answer(text, rollout.mode.thinking, bool(rollout.task.tools))

    def _next_phase(self, rollout: Rollout) -> None:
        number = self._index[rollout]
        self._phase[number] += 1
        self._phase_start[number] = len(rollout.tokens)

    def _record(self, kind: str, *values: object) -> None:
        if self.log is not None:
            self.log.append(kind, *values)


def _seed(*parts: int) -> int:
    """A 62-bit seed from numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 2


def environments_named(names: Sequence[str], known: Mapping[str, Environment]) -> dict[str, Environment]:
    """Of the `known` ones those with these names; InputError for another name."""
    for name in names:
        if name not in known:
            raise InputError(f"environment {name!r} does not exist; allowed: {', '.join(known)}")
    return {name: known[name] for name in names}
