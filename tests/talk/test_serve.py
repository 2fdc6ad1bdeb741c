"""`serve`: OpenAI's own client is satisfied, and everything else is refused in a sentence and harms nobody."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_process import Served, answer_of, errors, everything, expected, question, served

from qlora_dpo.talk import http_server
from qlora_dpo.talk.serve import ClientLimits

openai = pytest.importorskip("openai", reason="the openai client is in the dev extra")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


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
    (
        question(messages=[{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]),
        "messages[0].content has half a surrogate pair, which is no text",
    ),
    (question(**{"\ud800": 1}), "a key of the body has half a surrogate pair, which is no text"),
    (
        question(messages=[{"role": "user", "content": "a", "tool_calls": [{}]}]),
        "messages[0] has tool_calls, which are not supported here",
    ),
    (question(stream_options={"include_usage": 1}), "include_usage must be true or false"),
    (question(max_completion_tokens=True), "max_completion_tokens must be a whole number"),
    (question(n=True), "n is not supported here; leave it out"),
    (question(messages=3, modle="x"), "modle is no key that is known here; leave it out"),
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


def test_a_body_or_head_that_never_comes_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_server, "HEADER_TIMEOUT_SECONDS", 0.5)
    with served(limits=ClientLimits(seconds_to_send=0.5)) as server:
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
        assert errors(caplog) == []


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
