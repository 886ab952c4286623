"""``softpick serve`` with OpenAI's client: one server for all tests, and each answer is what ``generate`` gives alone."""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import softpick.integrations.transformers  # noqa: F401, E402
from softpick import cli  # noqa: E402
from softpick.experiment.failures import ModelError  # noqa: E402
from softpick.experiment.models import load_subject  # noqa: E402
from softpick.experiment.progress import Silent  # noqa: E402
from softpick.serving import serve as serving  # noqa: E402
from softpick.serving.settings import ServeSettings  # noqa: E402
from softpick.training.data import train_tokenizer  # noqa: E402

POSITIONS = 96
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
TEXT = "def keep(line):\n    return line.strip() + 'night and morning'\n\nclass Book:\n    pages = 12\n" * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("served") / "model"
    tokenizer = train_tokenizer([TEXT], 300)
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=POSITIONS, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation="softpick")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.4)
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)
    return str(home)


class Served(Silent):
    """A server in a thread."""

    def __init__(self, **settings):
        self.lines, self.ready = [], threading.Event()
        self.settings = ServeSettings(port=0, **settings)
        self.thread = threading.Thread(target=self._run)

    def say(self, text):
        self.lines.append(text)

    def _run(self):
        def ready(server):
            self.server = server
            self.ready.set()

        serving.serve(self.settings, self, ready)

    def __enter__(self):
        self.thread.start()
        assert self.ready.wait(60)
        self.url = self.lines[-1].split(" at ")[1].split("/v1")[0]
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def served(folder):
    gc.collect()
    gc.freeze()
    with Served(model=folder, device="cpu") as server:
        yield server
    gc.unfreeze()


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def alone(folder):
    """What ``generate`` gives to one prompt in a model of its own."""
    subject = load_subject(folder, reporter=Silent())

    def generated(prompt, tokens):
        ids = subject.tokenizer(prompt, return_tensors="pt")["input_ids"]
        found = subject.model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
        return subject.tokenizer.decode(found, skip_special_tokens=True)

    return generated


def same(text, expected):
    """Whether texts agree; transformers' streams leave out bytes at the end that are no whole character."""
    return text.rstrip("\ufffd") == expected.rstrip("\ufffd")


def chat_prompt(text):
    return f"<user>{text}<assistant>"


def post(served, path, data):
    request = urllib.request.Request(served.url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_health_and_models(served, client, folder):
    with urllib.request.urlopen(f"{served.url}/health", timeout=60) as answer:
        assert json.load(answer) == {"status": "ok"}
    assert [model.id for model in client.models.list()] == [folder]
    assert "softpick, cpu" in served.lines[-1]


def test_completion(client, folder, alone):
    answer = client.completions.create(model=folder, prompt="def keep", max_tokens=9)
    assert answer.choices[0].text == alone("def keep", 9)
    assert answer.usage.completion_tokens <= 9


def test_chat(client, folder, alone):
    messages = [{"role": "user", "content": "class"}]
    answer = client.chat.completions.create(model=folder, messages=messages, max_tokens=8)
    assert answer.choices[0].message.content == alone(chat_prompt("class"), 8)


def test_streaming(client, folder, alone):
    messages = [{"role": "user", "content": "pages"}]
    parts = list(client.chat.completions.create(model=folder, messages=messages, max_tokens=12, stream=True))
    assert same("".join(p.choices[0].delta.content or "" for p in parts), alone(chat_prompt("pages"), 12))
    assert parts[-1].choices[0].finish_reason in ("length", "stop")
    for _ in range(20):  # an answer may be there before anybody listens
        parts = list(client.completions.create(model=folder, prompt="re", max_tokens=1, stream=True))
        assert same("".join(p.choices[0].text for p in parts), alone("re", 1))


def test_32_at_once_do_not_mix(client, folder, alone):
    def ask(i):
        prompt, tokens = f"line {i} " * (1 + i % 5), 3 + i % 7
        # one name for all: a header that transformers would take as the name of each request
        named = {"extra_headers": {"x-request-id": "same"}}
        if i % 2:
            parts = client.completions.create(model=folder, prompt=prompt, max_tokens=tokens, stream=True, **named)
            return prompt, tokens, "".join(part.choices[0].text for part in parts)
        answer = client.completions.create(model=folder, prompt=prompt, max_tokens=tokens, **named)
        return prompt, tokens, answer.choices[0].text

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(32)))
    for prompt, tokens, text in answers:
        assert same(text, alone(prompt, tokens))


def test_a_client_that_goes_away(served, client, folder, alone):
    stream = client.completions.create(model=folder, prompt="def", max_tokens=90, stream=True)
    next(iter(stream))
    stream.close()
    hasty = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=0.05)
    with pytest.raises(openai.APITimeoutError):
        hasty.completions.create(model=folder, prompt="class", max_tokens=90)
    answer = client.completions.create(model=folder, prompt="def keep", max_tokens=9)
    assert answer.choices[0].text == alone("def keep", 9)
    scheduler = served_scheduler()
    end = time.monotonic() + 20
    while scheduler.active_requests and time.monotonic() < end:
        time.sleep(0.05)
    assert not scheduler.active_requests


def served_scheduler():
    from softpick.serving import engine

    state = next(each for each in gc.get_objects() if type(each) is engine.State)
    return state.batched.scheduler


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/completions", {"prompt": "a " * 200}, f"prompt: expected fewer tokens than the {POSITIONS} positions"),
        ("/v1/completions", {"prompt": "a", "temperature": 0.7}, "temperature: this server batches requests"),
        ("/v1/completions", {"prompt": "a", "stop": ["x"]}, "stop: this server batches requests"),
        ("/v1/completions", {"prompt": "a", "n": 2}, "n: this server does not have it"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens: expected an integer of at least 1, got 0"),
        ("/v1/completions", {"prompt": "a", "model": "other"}, "Server is pinned to"),
        ("/v1/chat/completions", {"messages": [{"content": "a"}]}, "messages: expected messages with a role"),
        ("/v1/chat/completions", {"messages": []}, "messages: expected a list of at least one message"),
    ],
)  # fmt: skip
def test_refused(served, path, body, said):
    status, text = post(served, path, json.dumps(body).encode())
    assert status == 400
    assert said in text


def test_no_room_for_a_long_answer(client, folder):
    answer = client.completions.create(model=folder, prompt="line " * 10, max_tokens=5000)
    assert answer.usage.total_tokens <= POSITIONS
    assert answer.choices[0].finish_reason == "length" or answer.usage.total_tokens < POSITIONS


def test_invalid_json(served):
    assert post(served, "/v1/completions", b'{"prompt": ')[0] == 422
    assert post(served, "/v1/completions", b"[1]")[0] == 422


def test_one_after_another(folder, alone):
    """Without batches a request has its own settings; ``sdpa`` is softmax, which gives another answer."""
    with Served(model=folder, device="cpu", continuous_batching=False) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(model=folder, prompt="def keep", max_tokens=9, temperature=0, stop=["zzzz"])
        assert answer.choices[0].text == alone("def keep", 9)
        parts = client.completions.create(model=folder, prompt="def keep", max_tokens=9, stream=True)
        assert same("".join(part.choices[0].text for part in parts), alone("def keep", 9))
        assert post(server, "/v1/completions", json.dumps({"prompt": "a " * 200}).encode())[0] == 400


def test_softmax_model(folder):
    subject = load_subject(folder, reporter=Silent(), attn_implementation="sdpa")
    ids = subject.tokenizer("def keep", return_tensors="pt")["input_ids"]
    expected = subject.model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    with Served(model=folder, device="cpu", attn_implementation="sdpa", cache_tokens=256, batch_tokens=64) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(model=folder, prompt="def keep", max_tokens=9)
    assert answer.choices[0].text == subject.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.long
def test_five_commands(tmp_path):
    """Those of docs/serving.md and the block of Python there, but the installation; fewer steps, a free port and an end."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    install, train, serve, health, ask = page.split("```bash\n")[1].split("```")[0].strip().splitlines()
    assert "softpick[serve]" in install
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    lines = [
        train.replace("tiny_cpu ", "tiny_cpu steps=2 "),
        serve,
        "trap 'kill $!; wait' EXIT",
        health,
        "echo",
        ask,
        f'"{sys.executable}" client.py > streamed',
    ]
    client = page.split("```python\n")[1].split("```")[0].replace("8000", port)
    (tmp_path / "client.py").write_text(client + "print(part.choices[0].finish_reason)\n", encoding="utf-8")
    command = tmp_path / "softpick"  # its process is the one that is ended
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m softpick "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    program = f'PATH="{tmp_path}:$PATH"\n' + "\n".join(lines).replace("8000", port)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-ec", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    healthy, answer = done.stdout.strip().splitlines()[-2:]
    assert json.loads(healthy) == {"status": "ok"}
    assert 0 < json.loads(answer)["usage"]["completion_tokens"] <= 16
    assert (tmp_path / "streamed").read_text(encoding="utf-8").strip().endswith(("length", "stop"))


def test_refused_before_serving(folder, served, monkeypatch):
    with pytest.raises(ModelError, match="port: expected at most 65,535"):
        ServeSettings(model=folder, port=70000)
    port = int(served.url.rsplit(":", 1)[1])
    with pytest.raises(ModelError, match=f"cannot listen on 127.0.0.1:{port}"):
        serving.serve(ServeSettings(model=folder, port=port), Silent())
    result = CliRunner().invoke(cli.build_app(), ["serve", "/nowhere", "--port", "0"])
    assert result.exit_code == 2
    assert "there is no directory or file /nowhere" in result.output
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "uvicorn" else True)
    result = CliRunner().invoke(cli.build_app(), ["serve", "model"])
    assert "this command needs uvicorn: pip install 'softpick[serve]'" in result.output
