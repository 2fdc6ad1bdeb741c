"""A loaded model over HTTP: OpenAI's chat format for programs, and the web page for people."""

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_dpo import __version__
from qlora_dpo.errors import QloraDpoError, RecipeError
from qlora_dpo.talk.access import SECURITY_HEADERS, AccessPolicy
from qlora_dpo.talk.chat_request import ChatRequest, UnknownModel, parse_chat_request
from qlora_dpo.talk.collect import append_pair
from qlora_dpo.talk.conversation import ModelVariant
from qlora_dpo.talk.engine import Engine, Event, GenerationRequest, ReplyFailed, ReplyFinished, TextChunk
from qlora_dpo.talk.generate import TokenUsage
from qlora_dpo.talk.sampling import SamplingParams

PAGE = Path(__file__).with_name("page")
FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css", "/icon.svg": "icon.svg"}

OPENAI_NAMES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
"""OpenAI's `type` of an error, by status; 5xx is server_error."""

UNREAD = (401, 403, 404, 408, 413, 415)
"""Refusals before the body was read: the connection cannot go on in the middle of it."""


@dataclass(frozen=True)
class ClientLimits:
    """What one client may take."""

    body_bytes: int = 2**20
    seconds_to_send: float = 20.0
    """For a request's body to arrive."""
    seconds_to_read: float = 60.0
    """For a piece of an answer to be taken; a client that reads nothing for so long is left."""


@dataclass
class Service:
    """What is served: the model's engine, the ids its voices are called by, and where votes are written, if at all."""

    engine: Engine
    models: Mapping[str, ModelVariant]
    defaults: SamplingParams
    access_policy: AccessPolicy
    preference_file: Path | None = None
    limits: ClientLimits = field(default_factory=ClientLimits)
    started: int = field(default_factory=lambda: int(time.time()))
    fixed_seed: bool = False
    """True if a request without a seed gets that of `defaults`, and so the same answer each time."""


class RequestRefused(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def create_app(service: Service) -> ASGIApp:
    """The service as an ASGI application."""

    async def chat(request: Request) -> Response:
        return await _chat(service, request)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.models]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in service.models:
            raise RequestRefused(
                404, f"there is no model of that name; there are {', '.join(service.models)}", "model_not_found"
            )
        return JSONResponse(_model(service, name))

    async def about(request: Request) -> Response:
        return JSONResponse(_about(service))

    async def preferences(request: Request) -> Response:
        return await _preferences(service, request)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / FILES[request.url.path])

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/about", about),
        Route("/v1/preferences", preferences, methods=["POST"]),
        Route("/health", health),
        *(Route(path, page) for path in FILES),
    ]
    handlers: Any = {
        RequestRefused: _refused,
        HTTPException: _no_such_path,
        ClientDisconnect: _nobody,
        Exception: _broken,
    }
    return _guarded(Starlette(routes=routes, exception_handlers=handlers), service)


def _guarded(app: ASGIApp, service: Service) -> ASGIApp:
    """`app` behind the guard, with the headers of `HEADERS`, leaving clients that do not read."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"  # neither lifespan nor websockets are switched on  # noqa: S101

        async def send_soon(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own]
            try:
                async with asyncio.timeout(service.limits.seconds_to_read):
                    await send(message)
            except TimeoutError as error:
                raise ClientDisconnect from error

        request = Request(scope)
        refusal = service.access_policy.refusal(scope["path"], request.headers.get)
        if refusal is not None:
            await _error(*refusal)(scope, receive, send_soon)
            return
        try:
            await app(scope, receive, send_soon)
        except ClientDisconnect:
            return
        except Exception as error:  # the client has been told; the others are still answered
            service.engine.log_error(f"a request failed: {type(error).__name__}: {error}")

    return guarded


async def _chat(service: Service, request: Request) -> Response:
    body = await _json(service, request)
    seed = service.defaults.seed if service.fixed_seed else secrets.randbelow(2**31)
    try:
        wanted = parse_chat_request(body, service.models, service.defaults, seed)
    except UnknownModel as error:
        raise RequestRefused(404, str(error), "model_not_found") from error
    except RecipeError as error:
        raise RequestRefused(400, str(error), "invalid_request") from error
    events: asyncio.Queue[Event] = asyncio.Queue()
    question = _question(wanted, events)
    if not service.engine.queue.try_put(question):
        raise RequestRefused(429, "too many questions are waiting; ask again in a moment", "queue_full")
    watch = asyncio.create_task(_watch(request, question.cancelled, events))
    try:
        first = await events.get()
        if isinstance(first, ReplyFailed):
            raise RequestRefused(first.status, first.message, first.code)
        identity = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": wanted.model}
        if wanted.stream:
            return StreamingResponse(
                _stream(wanted, identity, first, events, question.cancelled, watch), media_type="text/event-stream"
            )
        text, end = await _whole_reply(first, events)
        return JSONResponse(_completion(identity, text, end))
    except BaseException:
        question.cancelled.set()
        raise
    finally:
        if not wanted.stream:
            watch.cancel()


def _question(wanted: ChatRequest, events: asyncio.Queue[Event]) -> GenerationRequest:
    loop = asyncio.get_running_loop()

    def tell(event: Event) -> None:
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:  # the loop has ended, and with it the client
            return

    return GenerationRequest(wanted.voice, wanted.messages, wanted.settings, wanted.clip_to_context, wanted.stops, tell)


async def _watch(request: Request, gone: threading.Event, events: asyncio.Queue[Event]) -> None:
    """Wait until the client leaves; then the model need not go on."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    gone.set()
    events.put_nowait(ReplyFailed(499, "the client has left", "gone"))


async def _whole_reply(first: Event, events: asyncio.Queue[Event]) -> tuple[str, ReplyFinished]:
    said, event = list[str](), first
    while True:
        match event:
            case TextChunk(text):
                said.append(text)
            case ReplyFinished():
                return "".join(said), event
            case ReplyFailed(status, message, code):
                raise RequestRefused(status, message, code)
        event = await events.get()


async def _stream(
    wanted: ChatRequest,
    identity: Mapping[str, Any],
    first: Event,
    events: asyncio.Queue[Event],
    gone: threading.Event,
    watch: asyncio.Task[None],
) -> AsyncIterator[str]:
    """Server-sent events: a chunk per piece, one with the reason of the end, one that counts if asked for, [DONE]."""
    event = first
    try:
        yield _chunk(identity, {"role": "assistant", "content": ""}, None)
        while True:
            match event:
                case TextChunk(text):
                    yield _chunk(identity, {"content": text}, None)
                case ReplyFinished(reason, tally):
                    yield _chunk(identity, {}, reason)
                    if wanted.usage:
                        counted = {**_as(identity, "chat.completion.chunk"), "choices": [], "usage": _usage(tally)}
                        yield f"data: {json.dumps(counted)}\n\n"
                    yield "data: [DONE]\n\n"
                    return
                case ReplyFailed(status, message, code):
                    yield f"data: {json.dumps(_error_body(status, message, code))}\n\n"
                    return
            event = await events.get()
    finally:
        gone.set()
        watch.cancel()


async def _preferences(service: Service, request: Request) -> Response:
    """Append a vote to the file of `serve --collect`."""
    if service.preference_file is None:
        raise RequestRefused(404, "votes are not collected; start serve with --collect FILE", "not_collecting")
    match await _json(service, request):
        case {
            "messages": [*messages],
            "chosen": {"content": str(chosen), "model": str(chosen_by)},
            "rejected": {"content": str(rejected), "model": str(rejected_by)},
        } if all(map(_is_message, messages)):
            pair = (chosen, chosen_by[:200]), (rejected, rejected_by[:200])
        case _:
            raise RequestRefused(
                400, "a vote has messages, chosen and rejected (each with content and model)", "invalid_request"
            )
    try:
        append_pair(service.preference_file, messages, *pair)
    except RecipeError as error:
        raise RequestRefused(400, str(error), "invalid_request") from error
    except QloraDpoError as error:
        service.engine.log_error(str(error))
        raise RequestRefused(500, str(error), "failed") from error
    return JSONResponse({"written": True})


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


async def _json(service: Service, request: Request) -> Any:
    """The body as JSON, read within the limits."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestRefused(415, "send the body as application/json", "invalid_request")
    most, body = service.limits.body_bytes, bytearray()
    too_large = RequestRefused(413, f"the body is larger than {most:,} bytes", "too_large")
    if (told := request.headers.get("content-length", "0")).isdigit() and int(told) > most:
        raise too_large
    try:
        async with asyncio.timeout(service.limits.seconds_to_send):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_large
    except TimeoutError as error:
        raise RequestRefused(
            408, f"the body did not arrive in {service.limits.seconds_to_send:g} seconds", "too_slow"
        ) from error
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestRefused(400, "the body is not valid JSON", "invalid_request") from error


def _about(service: Service) -> dict[str, Any]:
    """What the page needs to know."""
    defaults = service.defaults
    return {
        "models": [{"id": name, "voice": voice} for name, voice in service.models.items()],
        "collect": service.preference_file is not None,
        "defaults": {
            "temperature": defaults.temperature,
            "top_p": defaults.top_p,
            "max_tokens": defaults.max_new_tokens,
        },
        "version": __version__,
    }


def _model(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started, "owned_by": "qlora-dpo"}


def _as(identity: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {"id": identity["id"], "object": kind, "created": identity["created"], "model": identity["model"]}


def _completion(identity: Mapping[str, Any], text: str, end: ReplyFinished) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.reason}
    return {**_as(identity, "chat.completion"), "choices": [choice], "usage": _usage(end.tally)}


def _chunk(identity: Mapping[str, Any], delta: dict[str, str], reason: str | None) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return f"data: {json.dumps({**_as(identity, 'chat.completion.chunk'), 'choices': [choice]})}\n\n"


def _usage(tally: TokenUsage) -> dict[str, Any]:
    return {
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
        "total_tokens": tally.prompt_tokens + tally.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": tally.cached_tokens},
    }


def _error_body(status: int, message: str, code: str) -> dict[str, Any]:
    kind = OPENAI_NAMES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _error(status: int, message: str, code: str) -> JSONResponse:
    headers = {"retry-after": "2"} if status in (429, 503) else {}
    if status in UNREAD:
        headers["connection"] = "close"
    return JSONResponse(_error_body(status, message, code), status, headers)


async def _refused(request: Request, error: RequestRefused) -> Response:
    return _error(error.status, error.message, error.code)


async def _no_such_path(request: Request, error: HTTPException) -> Response:
    sentence = "there is nothing at this address" if error.status_code == 404 else error.detail
    return _error(error.status_code, sentence, "not_found" if error.status_code == 404 else "not_allowed")


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _broken(request: Request, error: Exception) -> Response:
    return _error(500, "the request failed; the server's terminal says why", "failed")
