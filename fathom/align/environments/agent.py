"""Tool use: tasks done through calls to a small shop whose state decides the reward (report section 5, "agent").

The shop knows people and items by number; it takes orders and sends messages. It is rebuilt from the turns each time: an episode
goes on from a log. The reward asks for the final state, exactly: trying every number is no way to it.
"""

import json
import random
from collections.abc import Callable

from fathom.align.environments.base import Environment, Score, Task, assistant, broken_calls, check_effort, final_text, tool_call
from fathom.align.environments.math import same_value

PEOPLE = "Tom Ann Ben Eva Max Mia Sam Zoe".split()
ITEMS = "bag book cup hat lamp pen ring toy".split()
TEXTS = ("hello", "see you soon", "call me", "well done", "lunch is ready", "the bus is late", "good night", "thank you")
CALLS_A_TURN = 8
SPARE_TURNS = 4  # beyond the calls a task needs

TYPES: dict[str, type] = {"string": str, "integer": int}
SIGNATURES = {"find_person": {"name": "string"}, "find_item": {"name": "string"},
              "order": {"person": "integer", "item": "integer", "count": "integer"},
              "send": {"person": "integer", "text": "string"}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {
    "type": "object", "properties": {key: {"type": kind} for key, kind in keys.items()}, "required": list(keys)}}}
    for name, keys in SIGNATURES.items()]
Plan = list[list]  # of [thought, tool, arguments]


class AgentEnvironment(Environment):
    """Requests to a shop; the level is the number of calls that a request needs."""

    name = "agent"
    levels = range(1, 6)

    def make(self, rng: random.Random, level: int) -> tuple[list[dict], dict]:
        """A shop with random numbers and prices, and a request to it."""
        ids = rng.sample(range(10, 100), len(PEOPLE) + len(ITEMS))
        people = dict(zip(PEOPLE, ids, strict=False))
        prices = rng.sample(range(2, 31), len(ITEMS))
        items = {name: [number, price] for name, number, price in zip(ITEMS, ids[len(PEOPLE):], prices, strict=True)}
        question, plan, goal = rng.choice(REQUESTS[level])(rng, people, items)
        facts = {"people": people, "items": items, "plan": plan, "goal": {"orders": [], "messages": [], "answer": None} | goal}
        return [{"role": "system", "content": "", "tools": TOOLS}, {"role": "user", "content": question}], facts

    def step(self, task: Task, turns: list[dict]) -> list[dict] | None:
        """What the shop answers to the calls of the last turn."""
        if not calls_of(turns[-1:]) or sum(turn["role"] == "assistant" for turn in turns) >= task.level + SPARE_TURNS:
            return None
        shop = Shop(task.facts)
        answers = [shop.call(call) for turn in turns for call in calls_of([turn])]
        last = calls_of(turns[-1:])
        return [{"role": "tool", "tool_call_id": call.get("id") or "", "content": json.dumps(answer)}
                for call, answer in zip(last, answers[-len(last):], strict=True)]

    def score(self, task: Task, turns: list[dict]) -> Score:
        """1 if the shop ends as asked, and the last answer is the right one where there was a question."""
        shop, goal = Shop(task.facts), task.facts["goal"]
        calls = calls_of(turns)
        for call in calls:
            shop.call(call)
        text = final_text(turns)
        attempted = sum(len(turn.get("tool_calls") or []) for turn in turns if turn.get("role") == "assistant") + broken_calls(turns)
        valid = sum(arguments_of(call) is not None for call in calls)
        if text is None:
            right, why = False, "no finished answer"
        elif (shop.orders, shop.messages) != (goal["orders"], goal["messages"]):
            right, why = False, f"orders {shop.orders} and messages {shop.messages} are not what was asked"
        else:
            right = goal["answer"] is None or same_value(text, goal["answer"])
            why = "as asked" if right else f"expected {goal['answer']}, got {text[:40]!r}"
        return Score(float(right), text is not None, why, attempted, valid)

    def demonstration(self, task: Task, effort: str) -> list[dict]:
        """One call a turn; "high" says what comes next, "max" first says all that will be done, and then what is known."""
        return self._done(task, effort, task.facts["plan"], task.facts["goal"]["answer"] or "Done.")

    def careless(self, task: Task, effort: str) -> list[dict]:
        """All calls but the last, and no answer but that it is done. A call that is the only one is made, but for the last word of its text."""
        *calls, (thought, tool, arguments) = task.facts["plan"]
        *words, last = arguments.get("text", "").split() or [None]
        if not calls and last is None:
            calls = [[thought, tool, arguments]]
        elif not calls and words:
            calls = [[thought, tool, arguments | {"text": " ".join(words)}]]
        return self._done(task, effort, calls, "Done.")

    def _done(self, task: Task, effort: str, plan: Plan, answer: str) -> list[dict]:
        """The turns of a plan, and an answer."""
        thinks, turns, known = check_effort(effort), [], []
        for number, (thought, tool, arguments) in enumerate(plan):
            if effort == "max":
                start = f"Plan: {', '.join(name for _, name, _ in plan)}." if number == 0 else f"So far: {' '.join(known)}"
                known.append(thought)
                thought = f"{start} {thought}"
            turns.append(assistant("", thought if thinks else None, [tool_call(tool, arguments)]))
            turns += self.step(task, turns)
        thought = f"The answer is {answer}." if answer != "Done." else "All is done."
        return [*turns, assistant(answer, thought if thinks else None)]


class Shop:
    """The state of one shop: `orders` as [person, item, count] and `messages` as [person, text], in the order they came."""

    def __init__(self, facts: dict):
        self.people: dict[str, int] = facts["people"]
        self.items: dict[str, list[int]] = facts["items"]
        self.orders: list[list] = []
        self.messages: list[list] = []

    def call(self, call: dict) -> dict:
        """The result of a call, or {"error": what was wrong with it}."""
        name, arguments = call["function"]["name"], arguments_of(call)
        if name not in SIGNATURES:
            return {"error": "no such tool"}
        if arguments is None:
            return {"error": f"{name} needs {', '.join(f'{key}: {kind}' for key, kind in SIGNATURES[name].items())}"}
        if name == "find_person":
            return {"id": self.people[arguments["name"]]} if arguments["name"] in self.people else {"error": "no such person"}
        if name == "find_item":
            number, price = self.items.get(arguments["name"], (None, None))
            return {"id": number, "price": price} if number else {"error": "no such item"}
        if arguments["person"] not in self.people.values():
            return {"error": "no such person"}
        if name == "send":
            self.messages.append([arguments["person"], arguments["text"]])
            return {"sent": True}
        if arguments["item"] not in (number for number, _ in self.items.values()):
            return {"error": "no such item"}
        self.orders.append([arguments["person"], arguments["item"], arguments["count"]])
        return {"ordered": True}


def calls_of(turns: list[dict]) -> list[dict]:
    """The calls of the assistant's finished turns; a turn that makes too many makes none."""
    calls = [turn.get("tool_calls") or [] for turn in turns if turn.get("role") == "assistant" and not turn.get("wo_eos")]
    return [call for of_turn in calls if len(of_turn) <= CALLS_A_TURN for call in of_turn]


def arguments_of(call: dict) -> dict | None:
    """A call's arguments if they fit the tool's schema: all keys, no others, right types."""
    keys = SIGNATURES.get(call["function"]["name"])
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (TypeError, ValueError, RecursionError):
        return None
    if keys is None or not isinstance(arguments, dict) or arguments.keys() != keys.keys():
        return None
    return arguments if all(type(arguments[key]) is TYPES[kind] for key, kind in keys.items()) else None


Request = Callable[[random.Random, dict, dict], tuple[str, Plan, dict]]


def find(what: str, name: str) -> list:
    """The step that finds a person or an item."""
    return [f"I need {name}.", f"find_{what}", {"name": name}]


def ask_price(rng: random.Random, people: dict, items: dict) -> tuple[str, Plan, dict]:
    """One call: what an item costs."""
    item = rng.choice(ITEMS)
    question = rng.choice(("What does a {} cost?", "What is the price of a {}?", "How much is a {}?", "Tell me the price of a {}."))
    return question.format(item), [find("item", item)], {"answer": str(items[item][1])}


def send_to_number(rng: random.Random, people: dict, items: dict) -> tuple[str, Plan, dict]:
    """One call: a message to a person whose number is told."""
    person, text = people[rng.choice(PEOPLE)], rng.choice(TEXTS)
    return (f"Send person {person} the text: {text}", [[f"The person is {person}.", "send", {"person": person, "text": text}]],
            {"messages": [[person, text]]})


def send_to_name(rng: random.Random, people: dict, items: dict) -> tuple[str, Plan, dict]:
    """Two calls: find a person, send a message."""
    name, text = rng.choice(PEOPLE), rng.choice(TEXTS)
    question = rng.choice(("Send {} the text: {}", "Write to {}: {}", "Tell {} this: {}", "Let {} know: {}"))
    person = people[name]
    return (question.format(name, text), [find("person", name), [f"{name} is {person}.", "send", {"person": person, "text": text}]],
            {"messages": [[person, text]]})


def order_for_name(rng: random.Random, people: dict, items: dict) -> tuple[str, Plan, dict]:
    """Three calls: find a person and an item, order."""
    name, item, count = rng.choice(PEOPLE), rng.choice(ITEMS), rng.randint(2, 9)
    person, number = people[name], items[item][0]
    question = rng.choice(("Order {1} of the {2} for {0}.", "{0} wants {1} of the {2}.", "Buy {1} of the {2} for {0}."))
    plan = [find("person", name), [f"{name} is {person}. I need {item}.", "find_item", {"name": item}],
            [f"{name} is {person}. {item} is {number}.", "order", {"person": person, "item": number, "count": count}]]
    return question.format(name, count, item), plan, {"orders": [[person, number, count]]}


def order_and_send(rng: random.Random, people: dict, items: dict) -> tuple[str, Plan, dict]:
    """Four calls: an order, and a message to the same person."""
    question, plan, goal = order_for_name(rng, people, items)
    person, text = goal["orders"][0][0], rng.choice(TEXTS)
    plan.append([f"Ordered. Now the text to {person}.", "send", {"person": person, "text": text}])
    return f"{question} Then send the text: {text}", plan, goal | {"messages": [[person, text]]}


def order_cheaper(rng: random.Random, people: dict, items: dict) -> tuple[str, Plan, dict]:
    """Five calls: compare two items, order the cheaper one, send what it costs in all."""
    name, (first, second), count = rng.choice(PEOPLE), rng.sample(ITEMS, 2), rng.randint(2, 4)
    person, (cheap, dear) = people[name], sorted((first, second), key=lambda item: items[item][1])
    number, price = items[cheap]
    plan = [find("person", name), [f"{name} is {person}. I need {first}.", "find_item", {"name": first}],
            [f"{first} costs {items[first][1]}. I need {second}.", "find_item", {"name": second}],
            [f"{second} costs {items[second][1]}. {price} < {items[dear][1]}, so {cheap}, {number}.", "order",
             {"person": person, "item": number, "count": count}],
            [f"{count} * {price} = {count * price}.", "send", {"person": person, "text": str(count * price)}]]
    question = f"Order {count} of the cheaper of {first} and {second} for {name}. Then send {name} the total price."
    return question, plan, {"orders": [[person, number, count]], "messages": [[person, str(count * price)]]}


REQUESTS: dict[int, tuple[Request, ...]] = {
    1: (ask_price, send_to_number), 2: (send_to_name,), 3: (order_for_name,), 4: (order_and_send,), 5: (order_cheaper,)}
