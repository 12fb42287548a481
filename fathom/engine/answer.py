"""One choice of a request on its way: its tokens, where it stands, and the text that is certain so far."""

from fathom.engine.grammar import Matcher
from fathom.engine.prefix_cache import Found
from fathom.engine.request import FinishReason, Output, Request, Written
from fathom.engine.sampler import Sampler
from fathom.engine.scheduler import Place
from fathom.engine.stop_text import StopText
from fathom.text.tokenizer import Tokenizer


class Answer:
    """`limit` bounds prompt and answer together; `end_ids` end it (their text is not written)."""

    def __init__(self, request_id: int, choice: int, request: Request, limit: int, end_ids: frozenset[int], tokenizer: Tokenizer,
                 matcher: Matcher | None = None):
        self.request_id, self.choice, self.request = request_id, choice, request
        self.tokens = list(request.prompt)
        self.limit, self.end_ids = limit, end_ids
        self.place = Place(len(self.tokens))
        self.sampler = Sampler(request.sampling, request.prompt, choice)
        self.matcher = matcher
        self.hashes: list[bytes] = []  # of the prefix cache: of the tokens' complete blocks
        self.marks: list[int] = []  # positions in the prompt, in order, where the window's state is to be kept
        self.drafts: list[int] = []  # proposed next tokens
        self.found: Found | None = None  # in the prefix cache, between being found and being started
        self.kept_blocks = 0  # that the prefix cache has been given
        self.hit_tokens = 0
        self.finish: FinishReason | None = None
        self.started = False  # whether hit_tokens is known
        self.unread = False  # whether nothing was read since it was admitted
        self._stream, self._stops = tokenizer.stream(), StopText(request.sampling.stop)
        self._text: list[str] = []
        self._new: list[Written] = []

    def write(self, written: Written) -> None:
        """Take a token that was chosen; sets `finish` where it ends the answer."""
        token = written.token
        self.tokens.append(token)
        self.place.length += 1
        self._new.append(written)
        if self.matcher is not None and token not in self.end_ids:
            self.matcher.accept(token)
        if token in self.end_ids:
            self.end("stop")
            return
        self._text.append(self._stops.push(self._stream.push(token)))
        if self._stops.stop is not None or self.matcher is not None and self.matcher.ended:
            self.end("stop")
        elif len(self.tokens) >= self.limit:
            self.end("length")

    def end(self, finish: FinishReason) -> None:
        """Nothing more is written; what was held back is certain now."""
        self.finish = finish
        self._text += [self._stops.push(self._stream.flush()), self._stops.flush()]

    def collect(self) -> Output | None:
        """What is new since the last time, if anything."""
        if not self._new and self.finish is None:
            return None
        text, tokens = "".join(self._text), tuple(self._new)
        self._text, self._new = [], []
        return Output(self.request_id, self.choice, text, tokens, self.finish, self.hit_tokens, self._stops.stop)
