"""kill -9 while the cache is being written, a hundred times: what starts again on the same folder answers right."""

import multiprocessing
import os
import random
import signal
import time

import torch

from tests.engine.crashing import answer_for_ever, ask, parts, prompts, started

KILLS = 100


def test_after_a_hundred_kills_every_answer_is_right(tmp_path):
    context, chance = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["tests.engine.crashing"])
    model, tokenizer = parts()
    with torch.no_grad():
        logs = model(torch.tensor(prompts())).logits[..., :tokenizer.vocab_size].log_softmax(-1)
    hits = dropped = 0
    for number in range(KILLS):
        ready = context.Event()
        process = context.Process(target=answer_for_ever, args=(tmp_path, number, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(chance.random() * 0.15)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        engine = started(tmp_path)
        for _ in range(3):
            pick, length = chance.randrange(8), chance.randint(100, 700)
            output = ask(engine, prompts()[pick][:length])
            best = logs[pick, length - 1].topk(5)
            assert [token for token, _ in output.tokens[0].top] == best.indices.tolist()
            torch.testing.assert_close(torch.tensor([value for _, value in output.tokens[0].top]), best.values, atol=1e-4, rtol=0)
            hits += output.hit_tokens
        dropped += engine.stats().disk_dropped
        engine.close()
    assert hits > 0
    assert not [path for path in tmp_path.rglob(".tmp-*")]
