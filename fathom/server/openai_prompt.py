"""OpenAI's conversations -> messages and tools as the chat encoder takes them. Pure functions."""

from collections.abc import Sequence

from fathom.errors import ChatFormatError, InputError
from fathom.server.failures import Failure
from fathom.server.openai_types import AssistantMessage, ChatRequest, Message, SystemMessage, Text, Tool, ToolMessage, UserMessage

MISSING_REASONING = "The `reasoning_content` in the thinking mode must be passed back to the API."
MISSING_RESULTS = ("An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'. "
                   "(insufficient tool messages following tool_calls message)")
RESULT_WITHOUT_CALL = "Messages with role 'tool' must be a response to a preceding message with 'tool_calls'."


def chat_messages(request: ChatRequest, thinking: bool) -> tuple[list[dict], str]:
    """The messages, and reasoning that the answer has to go on with: that of a last turn with `prefix` that says nothing yet.

    ChatFormatError where there is nothing to answer, Failure where calls and results do not pair.
    """
    given, thoughts = request.messages, ""
    _check_last(given)
    _check_pairs(given)
    last = given[-1]
    if thinking and isinstance(last, AssistantMessage) and last.prefix and last.reasoning_content and not last.content:
        given, thoughts = given[:-1], last.reasoning_content
    return [_message(message) for message in given], thoughts


def check_reasoning(messages: Sequence[Message]) -> None:
    """Failure 400 for an earlier turn of the model without its reasoning, which a conversation with tools needs; empty will do."""
    for index, message in enumerate(messages):
        if isinstance(message, AssistantMessage) and message.reasoning_content is None:
            raise Failure(400, MISSING_REASONING, f"messages[{index}].reasoning_content", "invalid_request_error")


def function_tools(tools: Sequence[Tool]) -> list[dict]:
    """Tools as the prompt shows them: what was given, in the order name, description, parameters, strict."""
    return [{"type": "function", "function": tool.function.model_dump(exclude_none=True)} for tool in tools]


def tool_choice(request: ChatRequest) -> str:
    """auto, none, required, or the name of the tool to call; InputError where there is no such tool."""
    choice, names = request.tool_choice, [tool.function.name for tool in request.tools or ()]
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        if choice == "required" and not names:
            raise InputError("tool_choice: required needs tools")
        return choice
    if choice.function.name not in names:
        raise InputError(f"tool_choice.function.name: {choice.function.name[:80]!r} is none of the tools")
    return choice.function.name


def _text(content: Text | None) -> str:
    return content if isinstance(content, str) else "\n\n".join(part.text for part in content or ())


def _message(message: Message) -> dict:
    match message:
        case SystemMessage():
            return {"role": "system", "content": _text(message.content)}
        case ToolMessage():
            return {"role": "tool", "content": _text(message.content), "tool_call_id": message.tool_call_id}
        case AssistantMessage():
            return {
                "role": "assistant", "content": _text(message.content), "reasoning_content": message.reasoning_content or "",
                "tool_calls": [call.model_dump() for call in message.tool_calls or ()], "prefix": message.prefix, "task": message.task}
        case UserMessage():
            return {"role": "user", "content": _text(message.content), "task": message.task}
    return {"role": message.role, "content": _text(message.content)}


def _check_last(messages: Sequence[Message]) -> None:
    last = messages[-1]
    if isinstance(last, SystemMessage) or isinstance(last, AssistantMessage) and not (last.prefix or last.task or last.tool_calls):
        raise ChatFormatError(f"messages[{len(messages) - 1}]: the last one must be of the user or of a tool, "
                              "or of the assistant with prefix: true")


def _check_pairs(messages: Sequence[Message]) -> None:
    """Failure 400, in the words of DeepSeek's API, for a call without a result before the next turn, or a result without its call."""
    waiting: dict[str, None] = {}
    for index, message in enumerate(messages):
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in waiting:
                raise Failure(400, RESULT_WITHOUT_CALL, f"messages[{index}].tool_call_id", "invalid_request_error")
            del waiting[message.tool_call_id]
            continue
        if waiting:
            raise Failure(400, MISSING_RESULTS, f"messages[{index}]", "invalid_request_error")
        if isinstance(message, AssistantMessage):
            waiting = dict.fromkeys(call.id for call in message.tool_calls or ())
    if waiting:
        raise Failure(400, MISSING_RESULTS, f"messages[{len(messages) - 1}]", "invalid_request_error")
