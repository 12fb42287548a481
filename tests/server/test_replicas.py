"""Two replicas behind one address, with Ray Serve: the same beginning goes to the same one, and one that is killed is replaced. Skipped without Ray."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from fathom.checkpoint.released import save_model
from fathom.text.tokenizer import Tokenizer
from tests.models import random_model, small_config
from tests.runs import command, environment

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
TEXT = "The captain walked along the deck while a light wind filled every sail, and the sea was calm. "
DEADLINE = 300.0


class Site:
    """The running server."""

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, text: str, tokens: int = 4, stream: bool = False) -> tuple[int, dict, bytes]:
        """Status, headers and body of an answer."""
        body = {"model": "small", "max_tokens": tokens, "stream": stream, "messages": [{"role": "user", "content": text}]}
        return self.get("/anthropic/v1/messages", json.dumps(body).encode())

    def get(self, path: str, data: bytes | None = None) -> tuple[int, dict, bytes]:
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json", "anthropic-version": "2023-06-01"})
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as response:
                return response.status, dict(response.headers), response.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def replicas(self) -> list[dict]:
        """How the replicas are."""
        return json.loads(self.get("/replicas")[2])

    def until_up(self, changed: dict[int, int] = {}) -> list[dict]:
        """Waits until all replicas are up, those in `changed` as other processes."""
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            states = self.replicas()
            if all(state["up"] and state["process"] not in (None, changed.get(state["replica"])) for state in states):
                return states
            time.sleep(0.5)
        raise AssertionError(f"not all up: {self.replicas()}")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    tokenizer = Tokenizer.train([TEXT], 300)
    save_model(random_model(small_config([4, 128], vocab_size=tokenizer.vocab_size)), folder / "small")
    tokenizer.save(folder / "small")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {name: value for name, value in environment().items() if name != "RAY_ADDRESS"}
    with (folder / "log").open("w") as log:
        options = ("--replicas", "2", "--port", str(port), "--disk-cache", folder / "kv", "--cache-gib", "0.1")
        process = subprocess.Popen(command("serve", folder / "small", *options), stdout=log, stderr=log, env=variables)
    try:
        end = time.monotonic() + DEADLINE
        while "with 2 replicas" not in (folder / "log").read_text() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.5)
        assert "with 2 replicas" in (folder / "log").read_text(), (folder / "log").read_text()
        site = Site(port)
        site.until_up()
        yield site
        with ThreadPoolExecutor(6) as pool:  # a signal lets running answers finish, then all processes end
            answers = [pool.submit(site.ask, f"{number} at the end", 400, True) for number in range(6)]
            while sum(state["open"] for state in site.replicas()) == 0 and not all(answer.done() for answer in answers):
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            answers = [answer.result() for answer in answers]
        assert process.wait(DEADLINE) == 0
        assert all(b"message_stop" in body or status == 503 for status, _, body in answers) and any(status == 200 for status, _, _ in answers)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def test_the_page_the_api_and_errors_come_through_the_front(site):
    status, headers, page = site.get("/")
    assert status == 200 and b"<title>Fathom</title>" in page and headers["content-type"].startswith("text/html")
    status, _, body = site.ask("Hello")
    assert status == 200 and json.loads(body)["usage"]["output_tokens"] > 0
    status, _, body = site.ask("Hello", stream=True)
    assert status == 200 and b"event: message_start" in body and b"event: message_stop" in body
    assert site.get("/anthropic/v1/messages", b"{")[0] == 400 and site.get("/nothing")[0] == 404


def test_the_same_beginning_goes_to_the_same_replica_and_hits_its_cache(site):
    homes = set()
    for number in range(4):
        first = site.ask(f"{number} {TEXT * 12}")
        again = site.ask(f"{number} {TEXT * 12} And then?")
        assert first[0] == again[0] == 200 and first[1]["x-fathom-replica"] == again[1]["x-fathom-replica"]
        assert json.loads(first[2])["usage"]["cache_read_input_tokens"] == 0
        assert json.loads(again[2])["usage"]["cache_read_input_tokens"] >= 128
        homes.add(first[1]["x-fathom-replica"])
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda number: site.ask(f"{number} other {TEXT * 12}", 40), range(12)))
    assert {answer[0] for answer in answers} == {200}
    assert homes | {answer[1]["x-fathom-replica"] for answer in answers} == {"0", "1"}
    assert [state["open"] for state in site.replicas()] == [0, 0]
    for number in ("0", "1"):
        status, headers, text = site.get(f"/metrics?replica={number}")
        assert status == 200 and headers["x-fathom-replica"] == number and b"fathom:prompt_tokens_total" in text
    assert site.get("/metrics?replica=9")[0] == 503


def test_a_killed_replica_is_passed_over_and_comes_back(site):
    states = site.until_up()
    prompt = f"before the storm {TEXT * 12}"
    home = int(site.ask(prompt)[1]["x-fathom-replica"])
    body = {"model": "small", "max_tokens": 2000, "stream": True, "messages": [{"role": "user", "content": prompt}]}
    streamed = urllib.request.urlopen(urllib.request.Request(site.url + "/anthropic/v1/messages", json.dumps(body).encode(),
                                                             {"content-type": "application/json"}), timeout=DEADLINE)
    assert int(streamed.headers["x-fathom-replica"]) == home and streamed.read(1)
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(site.ask, f"{number} in flight {TEXT * 12}", 200) for number in range(8)]
        os.kill(states[home]["process"], signal.SIGKILL)
        after = site.ask(prompt)
        statuses = []
        for each in running:
            try:
                statuses.append(each.result()[0])
            except (urllib.error.URLError, ConnectionError, OSError, ValueError):
                statuses.append(None)  # its answer had begun
    assert b"event: error" in (rest := streamed.read()) or b"message_stop" in rest
    assert after[0] in (200, 503) and all(status in (200, 503, None) for status in statuses)
    if after[0] == 200 and int(after[1]["x-fathom-replica"]) == home:  # on a busy machine the next one may be there already
        assert site.until_up({home: states[home]["process"]})
    assert statuses.count(200) >= 1
    assert site.ask(prompt)[0] == 200
    fresh = site.until_up({home: states[home]["process"]})
    assert fresh[1 - home]["process"] == states[1 - home]["process"]
    assert site.ask(prompt)[0] == 200
