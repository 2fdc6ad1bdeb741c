"""What a client asks for in OpenAI's chat format, checked: every key is obeyed, harmless, or refused in a sentence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_dpo.data.dialogue import Message
from qlora_dpo.errors import RecipeError
from qlora_dpo.talk.conversation import ModelVariant
from qlora_dpo.talk.sampling import SamplingParams

MOST_MESSAGES = 1000
MOST_STOPS = 4
"""As many as OpenAI takes."""

CHAT_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""The roles that are known; `developer` is OpenAI's newer name of `system`."""

OBEYED = frozenset(
    {
        "model",
        "messages",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "max_tokens",
        "max_completion_tokens",
        "seed",
        "stop",
    }
)
LABELS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Keys that say something about a request and would not change its answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Keys of what is not done here, with the values that do not ask for it; clients send these unasked."""


@dataclass(frozen=True)
class ChatRequest:
    """A request that can be answered."""

    model: str
    voice: ModelVariant
    messages: list[Message]
    settings: SamplingParams
    clip_to_context: bool
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    """True if a stream is to end with a chunk that counts tokens."""


class UnknownModel(RecipeError):
    """The request names a model that is not served here."""


def parse_chat_request(
    body: Any, models: Mapping[str, ModelVariant], defaults: SamplingParams, seed: int
) -> ChatRequest:
    """Read the request in `body`; raise RecipeError with the sentence for the client.

    `models` are the ids that are served. `seed` is taken if the request has none; defaults.max_new_tokens is also the
    longest reply that can be asked for.
    """
    if not isinstance(body, dict):
        raise RecipeError("the body must be a JSON object with model and messages")
    for key, value in body.items():
        _check_key(key, value)
    model = body.get("model")
    if not isinstance(model, str) or model not in models:
        raise UnknownModel(f"model must be one of {', '.join(models)}")
    most = _whole(body, "max_completion_tokens", _whole(body, "max_tokens", None))
    if most is not None and most > defaults.max_new_tokens:
        raise RecipeError(
            f"max_tokens is {most}; replies here have {defaults.max_new_tokens} tokens at most (serve "
            "--max-new-tokens allows more)"
        )
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or not options.keys() <= {"include_usage", "include_obfuscation"}:
        raise RecipeError("stream_options must be an object; include_usage is the one that is known")
    settings = SamplingParams(
        temperature=_number(body, "temperature", defaults.temperature),
        top_p=_number(body, "top_p", defaults.top_p),
        max_new_tokens=defaults.max_new_tokens if most is None else most,
        seed=_whole(body, "seed", None) if body.get("seed") is not None else seed,
    )
    return ChatRequest(
        model=model,
        voice=models[model],
        messages=_messages(body.get("messages")),
        settings=settings,
        clip_to_context=most is None,
        stops=_stops(body.get("stop")),
        stream=_flag(body, "stream"),
        usage=_flag(options, "include_usage"),
    )


def _check_key(key: str, value: Any) -> None:
    if key in OBEYED or key in LABELS or value is None:
        return
    if key not in NEUTRAL:
        raise RecipeError(f"{key[:40]} is no key that is known here; leave it out")
    if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in NEUTRAL[key]):
        raise RecipeError(f"{key} is not supported here; leave it out")


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RecipeError("messages must be a list with at least one message")
    if len(value) > MOST_MESSAGES:
        raise RecipeError(f"messages are {len(value)}; at most {MOST_MESSAGES} are read")
    messages = [_message(each, place) for place, each in enumerate(value)]
    if messages[-1]["role"] != "user":
        raise RecipeError("the last message must be the user's; it is the one that is answered")
    return messages


def _message(value: Any, place: int) -> Message:
    if not isinstance(value, dict):
        raise RecipeError(f"messages[{place}] must be an object with role and content")
    role = value.get("role")
    if not isinstance(role, str) or role not in CHAT_ROLES:
        raise RecipeError(f"messages[{place}].role must be system, developer, user or assistant")
    if value.get("tool_calls"):
        raise RecipeError(f"messages[{place}] has tool_calls, which are not supported here")
    return {"role": CHAT_ROLES[role], "content": _content(value.get("content"), place)}


def _content(value: Any, place: int) -> str:
    """The text of a message, which may come in parts."""
    match value:
        case str():
            text = value
        case [*parts] if parts and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in parts
        ):
            text = "".join(part["text"] for part in parts)
        case _:
            raise RecipeError(f"messages[{place}].content must be text; images and sound are not read")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RecipeError(f"messages[{place}].content has half a surrogate pair, which is no text")
    return text


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(x, str) and x for x in stops):
        raise RecipeError(f"stop must be a string or a list of at most {MOST_STOPS} strings, none of them empty")
    return tuple(stops)


def _whole(body: Mapping[str, Any], key: str, default: Any) -> Any:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise RecipeError(f"{key} must be a whole number")
    if key != "seed" and value < 1:
        raise RecipeError(f"{key} is {value}; it must be at least 1")
    return value


def _number(body: Mapping[str, Any], key: str, default: float) -> float:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RecipeError(f"{key} must be a number")
    return value


def _flag(body: Mapping[str, Any], key: str) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise RecipeError(f"{key} must be true or false")
    return bool(value)
