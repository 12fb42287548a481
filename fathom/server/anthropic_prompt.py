"""The Anthropic dialect's conversations -> messages and tools as the chat encoder takes them. Pure functions."""

from collections.abc import Iterable
from itertools import groupby, takewhile

from fathom.errors import ChatFormatError
from fathom.server.anthropic_types import (
    AssistantBlock, AssistantMessage, CountRequest, SystemMessage, TextBlock, TextBlocks, ThinkingBlock, Tool, ToolResultBlock,
    ToolUseBlock, UserBlock, UserMessage,
)

# Claude Code heads its system text with such a line, another one in every request; no cached prefix would ever be hit.
BILLING_LINE = "x-anthropic-billing-header:"


def chat_messages(request: CountRequest) -> list[dict]:
    """System text and turns as messages with reasoning_content and tool_calls; a last turn of the assistant is to be continued.

    Instructions at the head join the system text; later ones are written as the user's, for the format has no other place there.
    ChatFormatError where the conversation does not begin with the user, or calls and results do not pair.
    """
    instructions = list(takewhile(lambda message: message.role == "system", request.messages))
    texts = [_system_text(content) for content in (request.system, *(message.content for message in instructions))]
    system, messages = "\n\n".join(filter(None, texts)), []
    for is_answer, turns in groupby(request.messages[len(instructions):], lambda message: message.role == "assistant"):
        if is_answer:
            messages.append(_assistant_message(turns))
        else:
            messages += [message for turn in turns for message in _user_messages(turn)]
    if not messages or messages[0]["role"] == "assistant":
        raise ChatFormatError("messages: the first one, instructions aside, must be of the user")
    _check_pairs(messages)
    if messages[-1]["role"] == "assistant":
        messages[-1]["prefix"] = True
    return [{"role": "system", "content": system}, *messages] if system else messages


def function_tools(tools: Iterable[Tool]) -> list[dict]:
    """Tools as OpenAI-style functions."""
    return [{"type": "function", "function": {
        "name": tool.name, "description": tool.description, "parameters": tool.input_schema,
        **({"strict": True} if tool.strict else {})}} for tool in tools]


def _blocks(message: UserMessage | AssistantMessage | SystemMessage) -> list[UserBlock] | list[AssistantBlock]:
    return [TextBlock(type="text", text=message.content)] if isinstance(message.content, str) else message.content


def _text(content: TextBlocks) -> str:
    return content if isinstance(content, str) else "\n\n".join(block.text for block in content)


def _system_text(content: TextBlocks) -> str:
    if not isinstance(content, str):
        return _text([block for block in content if not block.text.startswith(BILLING_LINE)])
    first, _, rest = content.partition("\n")
    return rest if first.startswith(BILLING_LINE) else content


def _user_messages(turn: UserMessage | SystemMessage) -> list[dict]:
    """A message for each block; the encoder joins neighbours to one turn."""
    return [{"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)} if isinstance(block, ToolResultBlock)
            else {"role": "user", "content": block.text} for block in _blocks(turn)] or [{"role": "user", "content": ""}]


def _assistant_message(turns: Iterable[AssistantMessage]) -> dict:
    """Neighbouring turns of the assistant as one; thinking comes first and calls come last, as the encoder writes them."""
    blocks = [block for turn in turns for block in _blocks(turn)]
    return {
        "role": "assistant",
        "reasoning_content": "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)),
        "content": "".join(block.text for block in blocks if isinstance(block, TextBlock)),
        "tool_calls": [{"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
                       for block in blocks if isinstance(block, ToolUseBlock)]}


def _check_pairs(messages: list[dict]) -> None:
    """ChatFormatError for a call without a result before the next turn of the assistant, or a result without its call."""
    waiting: dict[str, None] = {}
    for message in [*messages, {"role": "end"}]:
        match message["role"]:
            case "tool" if message["tool_call_id"] in waiting:
                del waiting[message["tool_call_id"]]
            case "tool":
                raise ChatFormatError(f"messages: the tool_result of tool_use_id {message['tool_call_id'][:80]!r} "
                                      "answers no tool_use block of the turn before it")
            case "assistant" | "end" if waiting:
                raise ChatFormatError(f"messages: the tool_use block {next(iter(waiting))[:80]!r} has no tool_result after it")
            case "assistant":
                waiting = dict.fromkeys(call["id"] for call in message["tool_calls"])
