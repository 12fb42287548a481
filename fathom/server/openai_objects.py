"""OpenAI's and DeepSeek's answers as types, for the OpenAPI description; openai_answer.py writes them."""

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class CalledFunction(BaseModel):
    """A function's name, and its arguments as JSON in a string."""

    name: str
    arguments: str


class MadeCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class TopToken(BaseModel):
    """A token that was likely at some place; -9999.0 stands for no probability at all."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopToken):
    """A token that was written, beside the likeliest ones there."""

    top_logprobs: list[TopToken]


class Logprobs(BaseModel):
    """Log-probabilities of the answer's tokens, calls included, and of the reasoning's."""

    content: list[TokenLogprob]
    reasoning_content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    """The model's turn; `reasoning_content` is there when it was asked to think."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[MadeCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: Logprobs | None = None


class PromptDetails(BaseModel):
    """Of the prompt's tokens: those from the prefix cache."""

    cached_tokens: int


class CompletionDetails(BaseModel):
    """Of the written tokens: those of the reasoning."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens of all prompts (hit and miss: found in the prefix cache or computed) and of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ChatCompletion(BaseModel):
    """The answer to a chat."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """Lists of the same length: a written token, its place in the text, its log-probability, the likeliest ones there."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(BaseModel):
    """One continuation; those of the first prompt come first."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: CompletionLogprobs | None = None


class Completion(BaseModel):
    """The continuations of the prompts."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class Model(BaseModel):
    """A model that is served; `max_model_len` bounds prompt and answer together, in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fathom"
    max_model_len: int


class ModelList(BaseModel):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorObject(BaseModel):
    """What went wrong: for people, and for programs; `param` names the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """An error in OpenAI's shape."""

    error: ErrorObject
