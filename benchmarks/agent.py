"""An agent through the HTTP server, with the official openai client: tasks solved, calls valid, and what of a long conversation is cached.

    python benchmarks/agent.py runs/pipeline/pro/distilled        100 held-out tasks of level 1, and a conversation of 50 turns

The server runs in a process of its own; the client holds the conversation, runs the tools (the shop of the environment `agent`) and sends
their results back, as any agent does. The long conversation asks one task after another, and its whole history goes back each time, as
the API returned it. Figures go to benchmarks/results/agent.json. Needs `pip install -e .[test]`.
"""

import json
import sys
from pathlib import Path

import openai
from serving import machine, server

from fathom.align.environments.agent import AgentEnvironment
from fathom.align.environments.base import Score, Task

RESULTS = Path(__file__).resolve().parent / "results" / "agent.json"
TASKS, TURNS, TOKENS, LEVEL = 100, 50, 320, 1
INSTRUCTIONS = "You keep a shop. " * 40  # of the long conversation: agents carry long ones


class Agent:
    """One conversation with a server: `messages` as they went over the line, and the usage of each request."""

    def __init__(self, client: openai.OpenAI, effort: str, instructions: str = ""):
        self.client, self.effort, self.usage = client, effort, []
        self.messages = [{"role": "system", "content": instructions}] if instructions else []

    def solve(self, environment: AgentEnvironment, task: Task) -> Score:
        """One task from the question to the verdict."""
        self.messages.append({"role": "user", "content": task.question})
        turns = []
        while True:
            answer = self.client.chat.completions.create(model="m", messages=self.messages, tools=task.tools, max_tokens=TOKENS, temperature=0,
                                                         reasoning_effort=self.effort, extra_body={"thinking": {"type": "enabled"}})
            self.usage.append(answer.usage)
            message = answer.choices[0].message.model_dump(exclude_none=True)
            self.messages.append(message)
            turns.append({"content": "", "wo_eos": answer.choices[0].finish_reason == "length"} | message)
            results = environment.step(task, turns)
            if results is None:
                self.messages += [{"role": "tool", "tool_call_id": call["id"], "content": "The shop is closed."}
                                  for call in message.get("tool_calls", ())]  # made one call too many: the API wants each answered
                return environment.score(task, turns)
            turns += results
            self.messages += results


def solve_tasks(client: openai.OpenAI, environment: AgentEnvironment, tasks: int) -> dict:
    """Held-out tasks, each in a conversation of its own."""
    scores, requests = [], 0
    for number in range(tasks):
        task, agent = environment.task(number, "held_out", LEVEL), Agent(client, "high")
        score = agent.solve(environment, task)
        scores.append(score)
        requests += len(agent.usage)
        if number < 3 or not score.reward:
            print(f"{task.key}  {task.question}  ->  {'solved' if score.reward else 'not solved'} in {len(agent.usage)} requests: {score.reason}")
    calls, valid = (sum(getattr(score, name) for score in scores) for name in ("calls", "valid_calls"))
    solved = sum(score.reward for score in scores) / tasks
    print(f"\n{solved:.0%} of {tasks} held-out tasks solved over HTTP in {requests} requests; {valid} of {calls} calls valid")
    return {"tasks": tasks, "solved": solved, "calls": calls, "valid_calls": valid, "requests": requests}


def long_conversation(client: openai.OpenAI, environment: AgentEnvironment, turns: int) -> dict:
    """Task after task in one conversation, until so many answers were asked for or the model's context is full."""
    agent, number = Agent(client, "max", INSTRUCTIONS), 0
    while len(agent.usage) < turns:
        try:
            agent.solve(environment, environment.task(number, "held_out", LEVEL))
        except openai.BadRequestError as error:
            if "maximum context length" not in error.message:
                raise
            print(f"the conversation ends after {len(agent.usage)} turns: {error.message}")
            turns = len(agent.usage)
        number += 1
    usage = agent.usage[:turns]
    asked, hit = (sum(getattr(each, name) for each in usage) for name in ("prompt_tokens", "prompt_cache_hit_tokens"))
    written = sum(each.completion_tokens for each in usage)
    print(f"{turns} turns with tools, the last prompt {usage[-1].prompt_tokens:,} tokens, {written / turns:.0f} tokens written a turn: "
          f"{hit:,} of {asked:,} prompt tokens hit, {hit / asked:.2%}")
    return {"turns": turns, "prompt_tokens": asked, "hit_tokens": hit, "written_tokens": written, "last_prompt_tokens": usage[-1].prompt_tokens,
            "share": hit / asked}


def main() -> None:
    """Solve, talk, print, keep."""
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    model, tasks = sys.argv[1], int(sys.argv[2]) if len(sys.argv) == 3 else TASKS
    environment, figures = AgentEnvironment(), {"model": Path(model).name, "machine": machine()}
    with server(model, "--name", "m") as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        figures["tasks"] = solve_tasks(client, environment, tasks)
        figures["conversation"] = long_conversation(client, environment, TURNS)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
