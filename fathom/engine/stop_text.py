"""Stop strings in a text that arrives piece by piece, across any borders, in linear time."""

from collections.abc import Sequence


class StopText:
    """Lets text through up to the first stop string, and holds back what may still become one (Knuth, Morris and Pratt's automaton)."""

    def __init__(self, stops: Sequence[str]):
        self._stops = [(stop, _fallbacks(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.stop: str | None = None

    def push(self, text: str) -> str:
        """What is certain now; after a stop string nothing more, and `stop` names it."""
        if self.stop is not None or not self._stops:
            return text if self.stop is None else ""
        text, seen = self._held + text, len(self._held)
        for end in range(seen, len(text)):
            for index, (stop, fallback) in enumerate(self._stops):
                matched = self._matched[index]
                while matched and stop[matched] != text[end]:
                    matched = fallback[matched - 1]
                matched += stop[matched] == text[end]
                if matched == len(stop):
                    self.stop, self._held = stop, ""
                    return text[:end + 1 - len(stop)]
                self._matched[index] = matched
        certain = len(text) - max(self._matched)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`, how long its longest proper prefix is that also ends it."""
    lengths = [0] * len(stop)
    matched = 0
    for end in range(1, len(stop)):
        while matched and stop[matched] != stop[end]:
            matched = lengths[matched - 1]
        matched += stop[matched] == stop[end]
        lengths[end] = matched
    return lengths
