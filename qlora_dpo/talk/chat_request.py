"""OpenAI's chat completion request, validated: every key is read, known to be harmless, or refused in a sentence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from qlora_dpo.data.dialogue import Message, sanitize_text
from qlora_dpo.errors import RecipeError
from qlora_dpo.talk.conversation import ModelVariant
from qlora_dpo.talk.sampling import SamplingParams

MAX_MESSAGES = 1000
MAX_STOP_STRINGS = 4
"""OpenAI's own limit."""

EXPECTED_TYPES = {"temperature": "a number", "top_p": "a number", "stream": "true or false"}
"""The type that an error names, by key; all others are whole numbers."""


class UnknownModel(RecipeError):
    """The request names a model that is not served."""


def _only(*values: Any) -> AfterValidator:
    """Accept these values alone: clients send them unprompted, and they request nothing that is not supported here."""

    def check(value: Any) -> Any:
        if not any(value == accepted and isinstance(value, bool) == isinstance(accepted, bool) for accepted in values):
            raise ValueError("is not supported here; leave it out")
        return value

    return AfterValidator(check)


def _no_tool_calls(value: Any) -> Any:
    if value:
        raise ValueError("has tool_calls, which are not supported here")
    return value


def _ends_with_user(messages: "list[RequestMessage]") -> "list[RequestMessage]":
    if messages[-1].role != "user":
        raise ValueError("the last message must be the user's; it is the one that is answered")
    return messages


def _check_unicode(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("has half a surrogate pair, which is no text")
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]


class _Part(BaseModel):
    """A part of a message's content; only text is supported."""

    model_config = ConfigDict(strict=True, frozen=True)
    type: Literal["text"]
    text: Text


class RequestMessage(BaseModel):
    """One message of a request; keys such as `name` are ignored. `developer` is OpenAI's newer name for `system`."""

    model_config = ConfigDict(strict=True, frozen=True)
    role: Literal["system", "developer", "user", "assistant"]
    tool_calls: Annotated[Any, AfterValidator(_no_tool_calls)] = None
    content: Annotated[
        Annotated[Text, Tag("text")] | Annotated[list[_Part], Field(min_length=1), Tag("parts")],
        Discriminator(lambda content: "parts" if isinstance(content, list) else "text"),
    ]

    def as_turn(self) -> Message:
        """The message as the chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`. `include_obfuscation` is accepted and has no effect."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    include_usage: bool | None = False
    include_obfuscation: Any = None


TokenLimit = Annotated[int, Field(ge=1)]
StopString = Annotated[str, Field(min_length=1)]


class ChatCompletionBody(BaseModel):
    """The request body. A key with the value null counts as absent."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    # Not supported; listed first so that they are reported before anything else
    n: Annotated[Any, _only(1)] = None
    frequency_penalty: Annotated[Any, _only(0)] = None
    presence_penalty: Annotated[Any, _only(0)] = None
    logit_bias: Annotated[Any, _only({})] = None
    logprobs: Annotated[Any, _only(False)] = None
    top_logprobs: Annotated[Any, _only(0)] = None
    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, _only(True, False)] = None
    functions: Annotated[Any, _only([])] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    modalities: Annotated[Any, _only(["text"])] = None

    # Labels, which do not change the reply
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    model: Any = None
    """Checked against the served models, since an unknown one has its own HTTP status."""
    max_completion_tokens: TokenLimit | None = None
    max_tokens: TokenLimit | None = None
    """OpenAI's older name for `max_completion_tokens`, which wins."""
    stream_options: StreamOptions = StreamOptions()
    temperature: int | float | None = None
    top_p: int | float | None = None
    seed: int | None = None
    messages: Annotated[
        list[RequestMessage], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_ends_with_user)
    ]
    stop: Annotated[
        list[StopString],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        Field(max_length=MAX_STOP_STRINGS),
    ] = []
    stream: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body


@dataclass(frozen=True)
class ChatRequest:
    """A valid request with the server's defaults filled in."""

    model: str
    variant: ModelVariant
    messages: list[Message]
    sampling: SamplingParams
    clip_to_context: bool
    """True if the request sets no length, so that the reply may end where the context does."""
    stop_strings: tuple[str, ...]
    stream: bool
    include_usage: bool
    """True if a stream is to end with a chunk that counts tokens."""


def parse_chat_request(
    body: Any, models: Mapping[str, ModelVariant], defaults: SamplingParams, seed: int
) -> ChatRequest:
    """Validate the request in `body`; raise RecipeError with a sentence for the client.

    `models` are the ids that are served. `seed` is used if the request has none; defaults.max_new_tokens is also the
    longest reply that can be requested.
    """
    parsed, problems = _validate(body)
    bad_key = next((problem for problem in problems if _concerns_key(problem)), None)
    if bad_key is None and isinstance(body, dict) and body.get("model") not in tuple(models):
        raise UnknownModel(f"model must be one of {', '.join(models)}")
    if parsed is None:
        raise RecipeError(_describe(bad_key or problems[0]))
    max_tokens = parsed.max_completion_tokens or parsed.max_tokens
    if max_tokens is not None and max_tokens > defaults.max_new_tokens:
        raise RecipeError(
            f"max_tokens is {max_tokens}; replies here have {defaults.max_new_tokens} tokens at most (serve "
            "--max-new-tokens allows more)"
        )
    return ChatRequest(
        model=parsed.model,
        variant=models[parsed.model],
        messages=[message.as_turn() for message in parsed.messages],
        sampling=SamplingParams(
            temperature=defaults.temperature if parsed.temperature is None else parsed.temperature,
            top_p=defaults.top_p if parsed.top_p is None else parsed.top_p,
            max_new_tokens=max_tokens or defaults.max_new_tokens,
            seed=seed if parsed.seed is None else parsed.seed,
        ),
        clip_to_context=max_tokens is None,
        stop_strings=tuple(parsed.stop),
        stream=parsed.stream,
        include_usage=bool(parsed.stream_options.include_usage),
    )


def _validate(body: Any) -> tuple[ChatCompletionBody | None, list[Any]]:
    try:
        return ChatCompletionBody.model_validate(body), []
    except ValidationError as error:
        return None, list(error.errors(include_url=False))


def _concerns_key(problem: Mapping[str, Any]) -> bool:
    """True for a top-level key that is unknown or not supported; that is reported before everything else."""
    unsupported = problem["type"] == "value_error" and problem["loc"] != ("messages",)
    return len(problem["loc"]) == 1 and (problem["type"] == "extra_forbidden" or unsupported)


def _describe(problem: Mapping[str, Any]) -> str:
    """One sentence for one of pydantic's errors: where, what, and what would be right."""
    match problem["loc"], problem["type"]:
        case (), "string_unicode":
            return "a key of the body has half a surrogate pair, which is no text"
        case (), _:
            return "the body must be a JSON object with model and messages"
        case (key,), "extra_forbidden":
            return f"{sanitize_text(str(key))[:40]} is no key that is known here; leave it out"
        case ("messages",), "too_long":
            return f"messages are {problem['ctx']['actual_length']}; at most {MAX_MESSAGES} are read"
        case ("messages",), "value_error":
            return str(problem["ctx"]["error"])
        case ("messages",), _:
            return "messages must be a list with at least one message"
        case ("messages", index), _:
            return f"messages[{index}] must be an object with role and content"
        case ("messages", index, "role", *_), _:
            return f"messages[{index}].role must be system, developer, user or assistant"
        case ("messages", index, "tool_calls", *_), _:
            return f"messages[{index}] {problem['ctx']['error']}"
        case ("messages", index, *_), "value_error":
            return f"messages[{index}].content {problem['ctx']['error']}"
        case ("messages", index, *_), _:
            return f"messages[{index}].content must be text; images and sound are not read"
        case ("stream_options", "include_usage"), "bool_type":
            return "include_usage must be true or false"
        case ("stream_options", *_), _:
            return "stream_options must be an object; include_usage is the one that is known"
        case ("stop", *_), _:
            return f"stop must be a string or a list of at most {MAX_STOP_STRINGS} strings, none of them empty"
        case (key, *_), "value_error":
            return f"{key} {problem['ctx']['error']}"
        case (key, *_), "greater_than_equal":
            return f"{key} is {problem['input']}; it must be at least {problem['ctx']['ge']}"
    return f"{problem['loc'][0]} must be {EXPECTED_TYPES.get(problem['loc'][0], 'a whole number')}"
