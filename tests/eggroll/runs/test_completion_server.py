"""docs/external.md is true: its blocks run against a stub server, learn, survive a server that fails, and resume."""

import contextlib
import functools
import http.server
import json
import re
import threading
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eggroll
from eggroll.llm import hf
from eggroll.llm.decoding import complete, pad_prompts
from tests.eggroll.llm.language_models import QWEN3, random_params

PAGE = Path(__file__).parents[3] / "docs" / "external.md"
LETTERS = "abcdef"
BY_HAND, IN_THE_LOOP, FOLDERS, ADAPTERS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def continued(weights, prompt):
    """The likeliest next letter, five times."""
    text = prompt
    for _ in range(5):
        text += LETTERS[int(np.argmax(weights[LETTERS.index(text[-1])]))]
    return text[len(prompt) :]


@functools.cache
def greedy(config):
    return jax.jit(functools.partial(complete, hf.make_generator(config), max_new_tokens=3, stop_token_ids=()))


def of_folder(folder, prompts):
    config, _, params = hf.load(folder)
    return greedy(config)(params, pad_prompts(prompts, length=4)).tokens.tolist()


class Handler(http.server.BaseHTTPRequestHandler):
    """POST /completions; `server.failure(body)` names what goes wrong with a request, or nothing."""

    wbufsize = -1  # an answer is sent as a whole

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request, failure = json.loads(body), self.server.failure(body)
        self.server.asked.append(failure)
        if failure == "closed":
            return
        if failure == "status" or self.path != "/completions":
            self.send_error(500)
            return
        if "model" in request:
            texts = of_folder(request["model"], request["prompts"])
        else:
            texts = [continued(request["weights"], prompt) for prompt in request["prompts"]]
        answer = {"short": texts[1:], "none": None}.get(failure, texts)
        body = b"{" if failure == "broken" else json.dumps({"completions": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Lets more connections wait than the page opens at a time; one too many is tried again after a second."""

    request_queue_size = 64


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked, server.failure = [], lambda body: None
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(names, *blocks):
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.fixture
def page(server):
    """The names of the page after its first block."""
    return run({"url": f"http://127.0.0.1:{server.server_port}"}, BY_HAND)


def trained(names, score, generations=12):
    es = eggroll.External(names["es"], names["sent"], score)
    state, batch = es.init({"w": jnp.zeros((6, 6))}, key=jax.random.key(0)), (None, list(LETTERS))
    return eggroll.train(es, state, batch, generations=generations, progress=False)[1]


def test_the_page_learns_and_resumes_without_the_server(page, server):
    assert page["metrics"].fitness.shape == (32,) and int(page["metrics"].invalid) == 0
    run(page, IN_THE_LOOP)
    fitness = [record.mean_fitness for record in page["history"]]
    assert fitness[0] < 0.2 and fitness[-1] > 0.6
    assert len(server.asked) == 32 * 13
    initial = page["es"].init({"w": jnp.zeros((6, 6))}, key=jax.random.key(0))
    again = eggroll.DurableRun("runs/served", page["served"], initial, config={"task": "alphabet"})
    with contextlib.closing(again):
        np.testing.assert_array_equal(again.state.params["w"], page["state"].params["w"])
    assert len(server.asked) == 32 * 13  # it was not asked


def test_scores_of_other_members_teach_nothing(page):
    random = np.random.default_rng(0)
    history = trained(page, lambda weights, prompts: random.permutation(page["score"](weights, prompts)))
    assert all(record.mean_fitness < 0.35 for record in history)


def test_what_a_server_does_wrong_costs_a_member_its_fitness(page, server):
    """Each of five failures for one of 32 requests, drawn from what is asked; the run goes on and learns."""
    failures = dict(enumerate(("status", "closed", "broken", "short", "none")))
    server.asked, server.failure = [], lambda body: failures.get(zlib.crc32(body) % 32)
    with pytest.warns(UserWarning, match="of 32 members was not finite in generation 0"):
        history = trained(page, page["score"], generations=20)
    assert set(server.asked) == {None, *failures.values()}
    for generation, record in enumerate(history):
        asked = server.asked[32 * generation : 32 * (generation + 1)]
        assert record.invalid == sum(failure is not None for failure in asked)
    assert history[-1].mean_fitness > 0.6


def test_no_server_at_all_changes_nothing(page, server):
    page["url"] = "http://127.0.0.1:0"  # nobody listens there
    with pytest.warns(UserWarning, match="the fitness of all 32 members"):
        (record,) = trained(page, page["score"], generations=1)
    assert record.invalid == 32 and record.skipped


def test_a_mistake_in_the_reward_stops_the_run(page):
    page["reward"] = lambda prompt, text: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trained(page, page["score"], generations=1)


@pytest.mark.slow
def test_members_of_a_language_model_as_folders_and_as_adapters(page):
    pytest.importorskip("safetensors")
    page |= {"config": QWEN3, "params": random_params(QWEN3)}
    run(page, FOLDERS, ADAPTERS)
    for index, answer in enumerate(page["answers"]):
        member = page["population"].member(index)
        assert answer == greedy(QWEN3)(member, pad_prompts([[5, 6, 7], [8, 9]], length=4)).tokens.tolist()
        adapter = page["adapter"](index)
        for name in ("q", "down"):
            inputs, outputs = adapter[f"blocks/{name}"]
            base = page["params"]["blocks"][name]
            np.testing.assert_allclose(base + jnp.einsum("lri,lor->lio", inputs, outputs), member["blocks"][name], atol=1e-6)
            assert np.abs(member["blocks"][name] - base).max() > 0.05
        np.testing.assert_array_equal(member["resident"]["final_norm"], page["params"]["resident"]["final_norm"])
        assert len(adapter) == sum(leaf.role != "frozen" for leaf in page["plan"].leaves)
    assert page["answers"][0] != page["answers"][1]
