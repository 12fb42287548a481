"""The Anthropic dialect's requests and answers as types; the OpenAPI description of its routes follows from them.

Fields that change nothing here (cache_control, budget_tokens, service_tier, container, mcp_servers, citations, is_error,
disable_parallel_tool_use, ...) are accepted and ignored. Blocks that cannot be read (image, document, search_result, those of
tools that a server runs) are refused.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from fathom.engine.sampler import LONGEST_STOP, MOST_STOPS

MOST_TOOLS, MOST_MESSAGES, LONGEST_USER = 128, 100_000, 512
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]


class _Given(BaseModel):
    """What a caller hands in: no conversions between types, no NaN, unknown fields ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextBlock(_Given):
    """A stretch of text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(_Given):
    """What the model thought; the signature is opaque, and not checked when the block comes back."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(_Given):
    """What another model thought, readable for that model only; left out of the prompt."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(_Given):
    """A call of a tool by the model, under whatever name it wrote."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


def _string_or_list(value: object) -> str:
    return "string" if isinstance(value, str) else "list"


_String = Annotated[str, Tag("string")]
TextBlocks = Annotated[_String | Annotated[list[TextBlock], Tag("list")], Discriminator(_string_or_list)]


class ToolResultBlock(_Given):
    """What a tool answered."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: TextBlocks = ""


UserBlock = Annotated[TextBlock | ToolResultBlock, Discriminator("type")]
AssistantBlock = Annotated[TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock, Discriminator("type")]


class UserMessage(_Given):
    """A turn of the user: text and results of tools."""

    role: Literal["user"]
    content: Annotated[_String | Annotated[list[UserBlock], Tag("list")], Discriminator(_string_or_list)]


class AssistantMessage(_Given):
    """A turn of the model: thinking, text and calls of tools; as the last message it is continued."""

    role: Literal["assistant"]
    content: Annotated[_String | Annotated[list[AssistantBlock], Tag("list")], Discriminator(_string_or_list)]


class SystemMessage(_Given):
    """An instruction in the middle of a conversation."""

    role: Literal["system"]
    content: TextBlocks


class Tool(_Given):
    """A tool that the caller runs; tools that a server would run are refused by their `type`."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str = ""
    input_schema: dict[str, Any]
    strict: bool = False


class AnyChoice(_Given):
    """Call tools or not (auto), call none, or call at least one (any)."""

    type: Literal["none", "auto", "any"]


class ToolChoice(_Given):
    """Call this tool."""

    type: Literal["tool"]
    name: str


class Thinking(_Given):
    """Whether to think before answering; adaptive counts as enabled."""

    type: Literal["enabled", "disabled", "adaptive"]


class JsonFormat(_Given):
    """The answer's text is JSON that follows this schema."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(_Given):
    """How hard to think (low, medium and high are one level, xhigh and max the other), and the form of the answer's text."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class Metadata(_Given):
    """Whose request it is; users share no cached prefixes."""

    user_id: Annotated[str, Field(max_length=LONGEST_USER)] | None = None


class CountRequest(_Given):
    """All that becomes part of a prompt."""

    model: str
    messages: Annotated[
        list[Annotated[UserMessage | AssistantMessage | SystemMessage, Discriminator("role")]],
        Field(min_length=1, max_length=MOST_MESSAGES)]
    system: TextBlocks = ""
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] = []
    tool_choice: Annotated[AnyChoice | ToolChoice, Discriminator("type")] | None = None
    thinking: Thinking = Thinking(type="enabled")
    output_config: OutputConfig = OutputConfig()


class MessageRequest(CountRequest):
    """A conversation to continue; `max_tokens` counts thinking and answer."""

    max_tokens: Annotated[int, Field(ge=1, le=2**40)]
    stop_sequences: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]], Field(max_length=MOST_STOPS)] = []
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31)] = 0
    stream: bool = False
    metadata: Metadata = Metadata()


class Usage(BaseModel):
    """Tokens of the prompt: read anew, and read from the prefix cache; tokens written, thinking included."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class Message(BaseModel):
    """An answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Annotated[ThinkingBlock | TextBlock | ToolUseBlock, Discriminator("type")]]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: Usage


class TokenCount(BaseModel):
    """The length of a prompt in tokens."""

    input_tokens: int


class ErrorObject(BaseModel):
    """What went wrong, for programs and for people."""

    type: str
    message: str


class ErrorResponse(BaseModel):
    """An error in Anthropic's shape."""

    type: Literal["error"] = "error"
    error: ErrorObject
    request_id: str | None = None
