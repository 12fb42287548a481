"""What a server may do, and for whom."""

from dataclasses import dataclass

from fathom.engine.request import MOST_CHOICES
from fathom.errors import InputError


@dataclass(frozen=True)
class ServerSettings:
    """Limits of a server. Sizes in bytes, times in seconds; InputError names the field that is out of range."""

    model_name: str = "fathom"
    api_keys: tuple[str, ...] = ()  # none: open to everyone who can reach it
    separate_usage: bool = False  # of streamed chats: in a last chunk without choices, as OpenAI's API, not in the last with one
    any_model: bool = False  # answer under whatever model name a request gives
    cors_origins: tuple[str, ...] = ()  # pages of other origins that may call; none by default
    body_bytes: int = 64 << 20
    json_items: int = 4_000_000  # values in a body; bounds the memory that reading it takes
    max_choices: int = 8  # n
    max_prompts: int = 64  # prompts in one request for completions
    body_timeout: float = 30.0  # without a byte of the body
    keep_alive: float = 10.0  # between signs of life while a client waits
    drain_seconds: float = 30.0  # for running requests, after a first signal to stop
    retry_after: int = 1
    require_reasoning: bool = False  # refuse turns with tools whose reasoning_content does not come back, as DeepSeek's API does

    def __post_init__(self):
        if not self.model_name or not self.model_name.isprintable():
            raise InputError(f"model_name is {self.model_name!r}; allowed: printable characters, at least one")
        for key in self.api_keys:
            if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError("an api_key is unusable; allowed: 8 or more printable ASCII characters without spaces")
        for name in ("body_bytes", "json_items", "max_prompts", "retry_after"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; allowed: at least 1")
        for name in ("body_timeout", "keep_alive", "drain_seconds"):
            if not 0 < getattr(self, name) < 1e9:
                raise InputError(f"{name} is {getattr(self, name)}; allowed: above 0 (seconds)")
        if not 1 <= self.max_choices <= MOST_CHOICES:
            raise InputError(f"max_choices is {self.max_choices}; allowed: 1 to {MOST_CHOICES}")
