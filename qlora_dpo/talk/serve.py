"""A loaded model over HTTP: OpenAI's chat format for programs, and the web page for people."""

import asyncio
import json
import logging
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
from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.errors import QloraDpoError, RecipeError
from qlora_dpo.talk.access import SECURITY_HEADERS, AccessPolicy
from qlora_dpo.talk.chat_request import ChatRequest, UnknownModel, parse_chat_request
from qlora_dpo.talk.collect import append_pair
from qlora_dpo.talk.conversation import ModelVariant
from qlora_dpo.talk.engine import Engine, Event, GenerationRequest, ReplyFailed, ReplyFinished, TextChunk
from qlora_dpo.talk.generate import TokenUsage
from qlora_dpo.talk.sampling import SamplingParams

PAGE_FOLDER = Path(__file__).with_name("page")
PAGE_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css", "/icon.svg": "icon.svg"}

ERROR_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
"""OpenAI's `type` of an error, by HTTP status; 5xx is server_error."""

CLOSING_STATUSES = (401, 403, 404, 408, 413, 415)
"""Refusals sent before the body was read; the connection is closed, since the rest of the body would follow."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClientLimits:
    """What one client may use of the server."""

    body_bytes: int = 2**20
    seconds_to_send: float = 20.0
    """Time for a request's body to arrive."""
    seconds_to_read: float = 60.0
    """Time for a client to read a chunk of a response; after that it is disconnected."""


@dataclass
class Service:
    """What is served: the engine, the ids of its model variants, and the file for preference votes, if there is one."""

    engine: Engine
    models: Mapping[str, ModelVariant]
    defaults: SamplingParams
    access_policy: AccessPolicy
    preference_file: Path | None = None
    limits: ClientLimits = field(default_factory=ClientLimits)
    started: int = field(default_factory=lambda: int(time.time()))
    fixed_seed: bool = False
    """True if a request without a seed uses that of `defaults`, and so gets the same reply each time."""


class RequestRefused(Exception):
    """A request that is refused, with its HTTP status and OpenAI's error code."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def create_app(service: Service) -> ASGIApp:
    """The service as an ASGI application."""

    async def chat(request: Request) -> Response:
        return await _chat(service, request)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model_record(service, name) for name in service.models]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in service.models:
            raise RequestRefused(
                404, f"there is no model of that name; there are {', '.join(service.models)}", "model_not_found"
            )
        return JSONResponse(_model_record(service, name))

    async def about(request: Request) -> Response:
        return JSONResponse(_about_record(service))

    async def preferences(request: Request) -> Response:
        return await _preferences(service, request)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def page(request: Request) -> Response:
        return FileResponse(PAGE_FOLDER / PAGE_FILES[request.url.path])

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/about", about),
        Route("/v1/preferences", preferences, methods=["POST"]),
        Route("/health", health),
        *(Route(path, page) for path in PAGE_FILES),
    ]
    handlers: Any = {
        RequestRefused: _on_refusal,
        HTTPException: _on_http_error,
        ClientDisconnect: _on_disconnect,
        Exception: _on_failure,
    }
    return _protect(Starlette(routes=routes, exception_handlers=handlers), service)


def _protect(app: ASGIApp, service: Service) -> ASGIApp:
    """`app` behind the access policy, with SECURITY_HEADERS; clients that do not read are disconnected."""

    async def protected_app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"  # neither lifespan nor websockets are switched on  # noqa: S101

        async def send_with_timeout(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *headers]
            try:
                async with asyncio.timeout(service.limits.seconds_to_read):
                    await send(message)
            except TimeoutError as error:
                raise ClientDisconnect from error

        request = Request(scope)
        refusal = service.access_policy.refusal(scope["path"], request.headers.get)
        if refusal is not None:
            await _error_response(*refusal)(scope, receive, send_with_timeout)
            return
        try:
            await app(scope, receive, send_with_timeout)
        except ClientDisconnect:
            return
        except Exception as error:  # the client has its response, and the server goes on for the others
            logger.error(sanitize_text(f"a request failed: {type(error).__name__}: {error}"))

    return protected_app


async def _chat(service: Service, request: Request) -> Response:
    body = await _read_json(service, request)
    seed = service.defaults.seed if service.fixed_seed else secrets.randbelow(2**31)
    try:
        chat_request = parse_chat_request(body, service.models, service.defaults, seed)
    except UnknownModel as error:
        raise RequestRefused(404, str(error), "model_not_found") from error
    except RecipeError as error:
        raise RequestRefused(400, str(error), "invalid_request") from error
    events: asyncio.Queue[Event] = asyncio.Queue()
    generation = _generation_request(chat_request, events)
    if not service.engine.queue.try_put(generation):
        raise RequestRefused(429, "too many questions are waiting; ask again in a moment", "queue_full")
    watch = asyncio.create_task(_cancel_on_disconnect(request, generation.cancelled, events))
    try:
        first = await events.get()
        if isinstance(first, ReplyFailed):
            raise RequestRefused(first.status, first.message, first.code)
        identity = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": chat_request.model}
        if chat_request.stream:
            chunks = _stream_chunks(chat_request, identity, first, events)
            return StreamingResponse(
                _cancel_at_end(chunks, generation.cancelled, watch), media_type="text/event-stream"
            )
        text, end = await _collect_reply(first, events)
        return JSONResponse(_completion(identity, text, end))
    except BaseException:
        generation.cancelled.set()
        raise
    finally:
        if not chat_request.stream:
            watch.cancel()


def _generation_request(chat_request: ChatRequest, events: asyncio.Queue[Event]) -> GenerationRequest:
    """The request for the engine; its events arrive in `events`, in the thread of the running event loop."""
    loop = asyncio.get_running_loop()

    def emit(event: Event) -> None:
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:  # the loop has ended, and with it the client
            return

    return GenerationRequest(
        chat_request.variant,
        chat_request.messages,
        chat_request.sampling,
        chat_request.clip_to_context,
        chat_request.stop_strings,
        emit,
    )


async def _cancel_on_disconnect(request: Request, cancelled: threading.Event, events: asyncio.Queue[Event]) -> None:
    """Wait until the client disconnects, then cancel the generation."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    cancelled.set()
    events.put_nowait(ReplyFailed(499, "the client has left", "gone"))


async def _collect_reply(first: Event, events: asyncio.Queue[Event]) -> tuple[str, ReplyFinished]:
    """Text and end of a reply that is not streamed; raises RequestRefused if it fails."""
    chunks, event = list[str](), first
    while True:
        match event:
            case TextChunk(text):
                chunks.append(text)
            case ReplyFinished():
                return "".join(chunks), event
            case ReplyFailed(status, message, code):
                raise RequestRefused(status, message, code)
        event = await events.get()


async def _cancel_at_end(
    chunks: AsyncIterator[str], cancelled: threading.Event, watch: asyncio.Task[None]
) -> AsyncIterator[str]:
    """`chunks`; however the stream ends, the generation is cancelled then."""
    try:
        async for chunk in chunks:
            yield chunk
    finally:
        cancelled.set()
        watch.cancel()


async def _stream_chunks(
    chat_request: ChatRequest, identity: Mapping[str, Any], first: Event, events: asyncio.Queue[Event]
) -> AsyncIterator[str]:
    """Server-sent events: one per text chunk, one with finish_reason, one with the usage if requested, [DONE]."""
    event = first
    yield _chunk(identity, {"role": "assistant", "content": ""}, None)
    while True:
        match event:
            case TextChunk(text):
                yield _chunk(identity, {"content": text}, None)
            case ReplyFinished(reason, usage):
                yield _chunk(identity, {}, reason)
                if chat_request.include_usage:
                    head = _response_head(identity, "chat.completion.chunk")
                    yield _server_sent({**head, "choices": [], "usage": _usage_record(usage)})
                yield "data: [DONE]\n\n"
                return
            case ReplyFailed(status, message, code):
                yield _server_sent(_error_body(status, message, code))
                return
        event = await events.get()


async def _preferences(service: Service, request: Request) -> Response:
    """Append a vote to the file of `serve --collect`."""
    if service.preference_file is None:
        raise RequestRefused(404, "votes are not collected; start serve with --collect FILE", "not_collecting")
    match await _read_json(service, request):
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
        logger.error(sanitize_text(str(error)))
        raise RequestRefused(500, str(error), "failed") from error
    return JSONResponse({"written": True})


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


async def _read_json(service: Service, request: Request) -> Any:
    """The body parsed as JSON, read within the service's limits; raises RequestRefused."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RequestRefused(415, "send the body as application/json", "invalid_request")
    max_bytes, body = service.limits.body_bytes, bytearray()
    too_large = RequestRefused(413, f"the body is larger than {max_bytes:,} bytes", "too_large")
    if (declared := request.headers.get("content-length", "0")).isdigit() and int(declared) > max_bytes:
        raise too_large
    try:
        async with asyncio.timeout(service.limits.seconds_to_send):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise RequestRefused(
            408, f"the body did not arrive in {service.limits.seconds_to_send:g} seconds", "too_slow"
        ) from error
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestRefused(400, "the body is not valid JSON", "invalid_request") from error


def _about_record(service: Service) -> dict[str, Any]:
    """What the page shows: models, defaults, and whether votes are collected."""
    defaults = service.defaults
    return {
        "models": [{"id": name, "voice": variant} for name, variant in service.models.items()],
        "collect": service.preference_file is not None,
        "defaults": {
            "temperature": defaults.temperature,
            "top_p": defaults.top_p,
            "max_tokens": defaults.max_new_tokens,
        },
        "version": __version__,
    }


def _model_record(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started, "owned_by": "qlora-dpo"}


def _response_head(identity: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The keys that OpenAI's responses share; `kind` is their `object`."""
    return {"id": identity["id"], "object": kind, "created": identity["created"], "model": identity["model"]}


def _completion(identity: Mapping[str, Any], text: str, end: ReplyFinished) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.reason}
    return {**_response_head(identity, "chat.completion"), "choices": [choice], "usage": _usage_record(end.usage)}


def _chunk(identity: Mapping[str, Any], delta: dict[str, str], reason: str | None) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return _server_sent({**_response_head(identity, "chat.completion.chunk"), "choices": [choice]})


def _server_sent(record: dict[str, Any]) -> str:
    return f"data: {json.dumps(record)}\n\n"


def _usage_record(usage: TokenUsage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _error_body(status: int, message: str, code: str) -> dict[str, Any]:
    kind = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _error_response(status: int, message: str, code: str) -> JSONResponse:
    headers = {"retry-after": "2"} if status in (429, 503) else {}
    if status in CLOSING_STATUSES:
        headers["connection"] = "close"
    return JSONResponse(_error_body(status, message, code), status, headers)


async def _on_refusal(request: Request, error: RequestRefused) -> Response:
    return _error_response(error.status, error.message, error.code)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    sentence = "there is nothing at this address" if error.status_code == 404 else error.detail
    return _error_response(error.status_code, sentence, "not_found" if error.status_code == 404 else "not_allowed")


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _on_failure(request: Request, error: Exception) -> Response:
    return _error_response(500, "the request failed; the server's terminal says why", "failed")
