"""A batch of answers -> tensors -> logits -> next tokens: prompts piece by piece, decoding together, drafts checked."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fathom.engine.answer import Answer
from fathom.engine.graphs import Graphs
from fathom.engine.paged_cache import PagedCache, PagedView, Row
from fathom.engine.request import Written
from fathom.engine.sampler import choose, log_probabilities
from fathom.errors import FathomError
from fathom.model.cache import Moves
from fathom.model.transformer import Transformer


class Runner:
    """Computes answers' tokens with `model` in `cache`; only ids below `known` are chosen. `drafts` tokens are proposed at a time.

    A draft is accepted where it is the very token that the answer's own sampler chooses there, so that drafts change no token, greedy
    or drawn. Without drafts, `graphs` decode.
    """

    def __init__(self, model: Transformer, cache: PagedCache, max_tokens: int, known: int, drafts: int = 0, graphs: Graphs | None = None):
        self.model, self.cache, self.max_tokens, self.known, self.drafts = model, cache, max_tokens, known, drafts
        self.graphs = graphs
        self.drafted = self.accepted = 0

    def prefill(self, answer: Answer, end: int) -> Tensor | None:
        """Compute the answer's tokens up to `end`. After the last known one, choose the next: its logits [V]."""
        place, begin = answer.place, answer.place.computed
        output = self.model(self._tensor([answer.tokens[begin:end]]), cache=self._view([answer]), last_only=True)
        place.computed = end
        logits_BV = output.logits[:, 0, :self.known]
        complete = end == place.length
        if complete:
            self.choose([answer], logits_BV)
        if self.drafts:
            self._draft([answer], [begin], [end - begin], output.streams)
        return logits_BV[0] if complete else None

    def decode(self, answers: Sequence[Answer]) -> None:
        """One step of answers that have one token to compute, in groups of similar context."""
        for group in _groups(answers):
            rows, logits_BV = self._rows(group) if self.graphs is not None else [], None
            if rows and not any(row.frozen for row in rows):
                logits_BV = self.graphs.step(rows, [answer.tokens[-1] for answer in group])
            if logits_BV is None:
                self._advance(group)
                continue
            self.choose(group, logits_BV[:, :self.known])
            for answer in group:
                answer.place.computed += 1

    def choose(self, answers: Sequence[Answer], logits_BV: Tensor) -> None:
        """Write the next token of each answer from its row of logits [B, V]."""
        masks, stuck = [], set()
        for answer in answers:
            try:
                masks.append(answer.matcher.allowed() if answer.matcher is not None else None)
            except FathomError:  # the grammar grew beyond its limits on the way
                masks.append(None)
                stuck.add(answer)
        tokens = choose([answer.sampler for answer in answers], logits_BV, masks)
        for answer, token, logits_V in zip(answers, tokens, logits_BV, strict=True):
            most = answer.request.sampling.logprobs
            written = Written(token) if most is None else Written(token, *log_probabilities(logits_V, token, most))
            try:
                answer.write(written) if answer not in stuck else answer.end("stop")
            except FathomError:
                answer.end("stop")

    def _advance(self, group: Sequence[Answer]) -> None:
        new = [[answer.tokens[-1], *answer.drafts] for answer in group]
        counts, starts = [len(tokens) for tokens in new], [answer.place.computed for answer in group]
        longest = max(counts)
        view, count_B = self._view(group, undo=longest > 1), self._tensor(counts)
        output = self.model(self._tensor([tokens + [0] * (longest - len(tokens)) for tokens in new]), cache=view, count_B=count_B)
        logits_BSV = output.logits[..., :self.known]
        if longest == 1:
            self.choose(group, logits_BSV[:, 0])
            kept = counts
        else:
            kept = [self._accept(answer, logits_SV) for answer, logits_SV in zip(group, logits_BSV, strict=True)]
        if kept != counts:
            view.forget(self._tensor(kept), Moves(self._tensor(starts), count_B, longest))
        for answer, count in zip(group, kept, strict=True):
            answer.place.computed += count
        if self.drafts:
            self._draft(group, starts, kept, output.streams)

    def _accept(self, answer: Answer, logits_SV: Tensor) -> int:
        """Choose tokens as long as the drafts foresaw them; how many of the new positions count."""
        self.drafted += len(answer.drafts)
        for position, draft in enumerate([*answer.drafts, None]):
            self.choose([answer], logits_SV[position:position + 1])
            if answer.finish is not None or answer.tokens[-1] != draft:
                self.accepted += position
                return position + 1
        return len(answer.drafts) + 1

    def _draft(self, group: Sequence[Answer], starts: Sequence[int], counts: Sequence[int], streams_BSNW: Tensor) -> None:
        """Take the MTP block over the computed positions, and let it propose what follows the last known token."""
        longest = max(counts)
        following = [answer.tokens[begin + 1:begin + count + 1] for answer, begin, count in zip(group, starts, counts, strict=True)]
        padded = self._tensor([tokens + [0] * (longest - len(tokens)) for tokens in following])
        view, count_B = self._view(group, starts, mtp=True), self._tensor(counts)
        output = self.model.draft(streams_BSNW[:, :longest], padded, view, count_B)
        for answer in group:
            answer.drafts = []
        group_rows = [row for row, answer in enumerate(group) if answer.finish is None and answer.place.missing == 1]
        if not group_rows:
            return
        last_B = count_B - 1
        streams_B1NW = output.streams[torch.arange(len(group), device=last_B.device), last_B][:, None]
        token_B, undone = output.logits[:, 0, :self.known].argmax(-1), []
        ones_B, at_B = torch.ones_like(count_B), self._tensor(starts) + count_B
        for step in range(self.drafts):
            for row in group_rows:
                if len(group[row].tokens) + 1 + step < group[row].limit:
                    group[row].drafts.append(int(token_B[row]))
            if step + 1 < self.drafts:
                view = self._view(group, (at_B + step).tolist(), mtp=True, undo=True)
                output = self.model.draft(streams_B1NW, token_B[:, None], view, ones_B)
                undone.append((view, Moves(at_B + step, ones_B, 1)))
                token_B, streams_B1NW = output.logits[:, 0, :self.known].argmax(-1), output.streams
        for view, moves in reversed(undone):
            view.forget(torch.zeros_like(ones_B), moves)

    def _view(self, answers: Sequence[Answer], starts: Sequence[int] | None = None, mtp: bool = False, undo: bool = False) -> PagedView:
        return self.cache.view(self._rows(answers, starts), self.max_tokens, mtp, undo)

    def _rows(self, answers: Sequence[Answer], starts: Sequence[int] | None = None) -> list[Row]:
        places = [answer.place for answer in answers]
        return [Row(place.slot, place.blocks, start, place.frozen if start < place.frozen else 0)
                for place, start in zip(places, starts or [place.computed for place in places], strict=True)]

    def _tensor(self, numbers: Sequence) -> Tensor:
        return torch.tensor(numbers, device=self.cache.device)


def _groups(answers: Sequence[Answer]) -> Iterator[list[Answer]]:
    """Answers whose contexts have the same number of binary digits in blocks: a row is padded to twice its length at most."""
    groups: dict[int, list[Answer]] = {}
    for answer in sorted(answers, key=lambda answer: answer.place.slot):
        groups.setdefault(len(answer.place.blocks).bit_length(), []).append(answer)
    yield from groups.values()
