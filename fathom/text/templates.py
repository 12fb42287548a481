"""The fixed texts of the chat format: tags of tool calls and results, and the released prompts, to the character.

Report section 5.1.1 and the released encoder. Written by chat.py, read back by chat_parse.py; knows no messages.
"""

from fathom.text.tokenizer import DSML

THINKING_MODES = ("thinking", "chat")

CALLS_OPEN, CALLS_CLOSE = f"\n\n<{DSML}tool_calls", f"</{DSML}tool_calls>"
CALL_OPEN, CALL_CLOSE = f'<{DSML}invoke name="', f"</{DSML}invoke>"
PARAMETER_OPEN, PARAMETER_CLOSE = f'<{DSML}parameter name="', f"</{DSML}parameter>"
RESULT_OPEN, RESULT_CLOSE = "<tool_result>", "</tool_result>"

TOOLS_PROMPT = """\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, \
arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{tool_schemas}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""

RESPONSE_FORMAT_PROMPT = """\
## Response Format:

You MUST strictly adhere to the following schema to reply:
"""

MAX_EFFORT_PROMPT = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, \
and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""
