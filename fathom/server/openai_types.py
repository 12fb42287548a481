"""OpenAI's and DeepSeek's requests as types: what may be asked, with its limits; the OpenAPI description follows from them.

Fields that this server does not know are ignored, as other servers of this dialect do. Known ones that it cannot follow are refused,
so that nobody relies on them (see UNSUPPORTED). Answers are in openai_objects.py.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, FailFast, Field, Tag, model_validator

from fathom.engine.sampler import LONGEST_STOP, MOST_BIASES, MOST_LOGPROBS, MOST_STOPS
from fathom.server.failures import Failure

MOST_TOOLS, MOST_MESSAGES, MOST_IDS, MOST_STOP_IDS, LONGEST_USER = 128, 100_000, 1 << 21, 64, 512
UNSUPPORTED = {
    "functions": "give them as tools", "function_call": "use tool_choice", "chat_template": "the chat format is the model's own",
    "chat_template_kwargs": "use thinking and reasoning_effort", "prompt_embeds": "give text", "prediction": "leave it out",
    "audio": "this model writes text", "web_search_options": "give a tool that searches", "min_tokens": "use logit_bias or ignore_eos",
    "prompt_logprobs": "leave it out", "logits_processors": "use logit_bias", "guided_json": "use response_format of type json_schema",
    "guided_regex": "use response_format of type regex", "guided_grammar": "use response_format", "guided_choice": "use response_format",
    "structured_outputs": "use response_format", "grammar": "use response_format"}


class _FailFast(FailFast):
    """Looking at a list ends with its first wrong item. Hashable, as parts of unions have to be."""

    __hash__ = object.__hash__


FAST = _FailFast()


class _Given(BaseModel):
    """What a caller hands in: no conversions between types, no NaN, unknown fields ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(_Given):
    """A stretch of text; pictures and sounds cannot be read."""

    type: Literal["text"]
    text: str


def _string_or_list(value: object) -> str:
    return "string" if isinstance(value, str) else "list"


_String = Annotated[str, Tag("string")]
_Parts = Annotated[list[TextPart], FAST, Tag("list")]
Text = Annotated[_String | _Parts, Discriminator(_string_or_list)]
QuickTask = Literal["query", "authority", "domain", "read_url", "action", "title"]


class SystemMessage(_Given):
    """An instruction; `developer` is OpenAI's newer name for it."""

    role: Literal["system", "developer"]
    content: Text


class ReminderMessage(_Given):
    """A reminder that stands outside the turns."""

    role: Literal["latest_reminder"]
    content: Text


class UserMessage(_Given):
    """A turn of the user. `task` asks for one of the model's quick instructions instead of an answer."""

    role: Literal["user"]
    content: Text
    task: QuickTask | None = None


class CalledFunction(_Given):
    """A function's name, and its arguments as JSON in a string."""

    name: str
    arguments: str


class ToolCall(_Given):
    """A call that the model made."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(_Given):
    """A turn of the model. With `prefix`, as the last message, it is continued: its reasoning where that is all there is."""

    role: Literal["assistant"]
    content: Annotated[_String | _Parts | Annotated[None, Tag("none")],
                       Discriminator(lambda value: "none" if value is None else _string_or_list(value))] = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_MESSAGES), FAST] | None = None
    prefix: bool = False
    task: QuickTask | None = None


class ToolMessage(_Given):
    """What a tool answered to a call."""

    role: Literal["tool"]
    content: Text
    tool_call_id: str


Message = Annotated[SystemMessage | ReminderMessage | UserMessage | AssistantMessage | ToolMessage, Discriminator("role")]


class Function(_Given):
    """A function that the caller runs; `parameters` is the JSON schema of its arguments, which `strict` makes binding."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Given):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Given):
    """A function by its name."""

    name: str


class NamedTool(_Given):
    """This tool has to be called."""

    type: Literal["function"]
    function: NamedFunction


class Thinking(_Given):
    """Whether to think before answering."""

    type: Literal["enabled", "disabled"]


class TextFormat(_Given):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(_Given):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchema(_Given):
    """A JSON schema; it binds the answer whether or not it says `strict`."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class SchemaFormat(_Given):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(_Given):
    """Text that a regex matches as a whole (Fathom's own addition)."""

    type: Literal["regex"]
    pattern: str


class StreamOptions(_Given):
    """`include_usage`: every chunk has the field usage; it is null in all but the last."""

    include_usage: bool | None = None


def _short_in_bytes(text: str) -> str:
    if len(text.encode()) > LONGEST_USER:
        raise ValueError(f"longer than {LONGEST_USER} bytes")
    return text


User = Annotated[str, Field(max_length=LONGEST_USER), AfterValidator(_short_in_bytes)]
_Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
_Count = Annotated[int, Field(ge=1, le=2**40)]


class Wishes(_Given):
    """How to choose tokens and when to stop, for chats and completions alike. None: as if it was not there."""

    model: str
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: _Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=MOST_BIASES)] | None = None
    seed: Annotated[int, Field(ge=-2**63, lt=2**63)] | None = None
    stop: Annotated[
        Annotated[_Stop, Tag("string")] | Annotated[list[_Stop], Field(max_length=MOST_STOPS), FAST, Tag("list")]
        | Annotated[None, Tag("none")],
        Discriminator(lambda value: "none" if value is None else _string_or_list(value))] = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MOST_STOP_IDS), FAST] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: User | None = None
    user_id: User | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        for name, advice in UNSUPPORTED.items() if isinstance(body, dict) else ():
            if body.get(name):
                raise Failure(400, f"{name}: this server does not support it; {advice}", name, "unsupported_parameter")
        return body


class ChatRequest(Wishes):
    """A conversation to continue; `max_tokens` (or `max_completion_tokens`) counts thinking and answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES), FAST]
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS), FAST] | None = None
    tool_choice: Annotated[
        Annotated[Literal["none", "auto", "required"], Tag("string")] | Annotated[NamedTool, Tag("tool")]
        | Annotated[None, Tag("none")],
        Discriminator(lambda value: "none" if value is None else "string" if isinstance(value, str) else "tool")] = None
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat | RegexFormat, Discriminator("type")] | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None


def _kind_of_prompt(value: object) -> str:
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(value, str):
        return "text"
    return "ids" if isinstance(first, int) else "lists" if isinstance(first, list) else "texts"


_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=MOST_IDS), FAST]


class CompletionRequest(Wishes):
    """Texts or token ids to continue; with `suffix`, what belongs between prompt and suffix. `max_tokens` is 16 unless given."""

    prompt: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[str], Field(min_length=1, max_length=MOST_MESSAGES), FAST, Tag("texts")]
        | Annotated[_Ids, Tag("ids")] | Annotated[list[_Ids], Field(min_length=1, max_length=MOST_MESSAGES), FAST, Tag("lists")],
        Discriminator(_kind_of_prompt)]
    suffix: str | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
