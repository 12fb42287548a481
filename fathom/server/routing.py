"""Which of several replicas gets a request: the one that read the same beginning before, unless it is much busier than another.

Plain integers and texts, no network. A replica's prefix cache keeps blocks of 128 tokens; here 512 characters stand for them, so that
nothing has to be encoded before it is known where.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence

BLOCK_CHARACTERS = 512
MOST_BLOCKS = 256  # of a prompt: beginnings that agree so far are the same to the router
MOST_KNOWN = 1 << 16  # beginnings that are remembered


def prefix_keys(body: bytes, tenant: str = "") -> list[bytes]:
    """A digest for each whole block of a request's leading text, each of all that stands before it too; [] where there is none.

    Tools and system text come first, as in the prompt. Different tenants share no cache, so they share no digests.
    """
    try:
        request = json.loads(body)
        leading = [request.get(name) for name in ("tools", "system", "messages", "prompt")] if isinstance(request, dict) else []
        text = "\n".join(part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in leading if part)
        data = text.encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return []  # the replica says what is wrong
    whole = min(len(data) // BLOCK_CHARACTERS, MOST_BLOCKS)
    digest, keys = hashlib.sha256(tenant.encode()), []
    for block in range(whole):
        digest.update(data[block * BLOCK_CHARACTERS:(block + 1) * BLOCK_CHARACTERS])
        keys.append(digest.digest())
    return keys


class PrefixRouter:
    """Remembers which replica read which beginning last, the least recently asked for forgotten first.

    `slack`: how many more open requests than the idlest replica a replica may have before it is passed over.
    """

    def __init__(self, slack: int = 4, most_known: int = MOST_KNOWN):
        self.slack, self.most_known = slack, most_known
        self._known: OrderedDict[bytes, int] = OrderedDict()

    def choose(self, keys: Sequence[bytes], open_requests: Sequence[int | None]) -> int | None:
        """A replica's number for a request with these keys, given each one's open requests (None: it is down); None where all are down."""
        up = [(count, number) for number, count in enumerate(open_requests) if count is not None]
        if not up:
            return None
        least, chosen = min(up)
        for key in reversed(keys):
            known = self._known.get(key)
            if known is not None and open_requests[known] is not None:
                chosen = known if open_requests[known] <= least + self.slack else chosen
                break
        for key in keys:
            self._known[key] = chosen
            self._known.move_to_end(key)
        while len(self._known) > self.most_known:
            self._known.popitem(last=False)
        return chosen
