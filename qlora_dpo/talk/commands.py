"""The slash commands of a chat: what each does to the conversation, and the text it shows."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qlora_dpo.errors import QloraDpoError, RecipeError
from qlora_dpo.talk.collect import append_pair
from qlora_dpo.talk.conversation import Conversation, Reply, clear_history, latest_replies, transcript, undo_last_turn
from qlora_dpo.talk.sampling import SAMPLING_PARAM_NAMES, SamplingParams

COMMANDS = {
    "/help": ("", "show this list"),
    "/new": ("", "forget what was said; system prompt and settings stay"),
    "/system": ("[TEXT|none]", "show, set or remove the system prompt"),
    "/set": ("[KEY VALUE]", "show the settings, or change one: temperature, top_p, max_new_tokens, seed"),
    "/base": ("", "answer with the adapter switched off; again: with it"),
    "/both": ("", "answer with tuned and base model, the tuned answer is kept; again: tuned only"),
    "/retry": ("", "answer the last message again"),
    "/reward": ("", "how much likelier training has made the last answer: beta * log(pi / pi_ref)"),
    "/better": ("a|b FILE", "of the last two answers a or b is better: append the pair to FILE (.jsonl)"),
    "/undo": ("", "take back the last message and its answer"),
    "/save": ("FILE", "write the conversation to a new JSON file"),
    "/quit": ("", "leave (so does Ctrl+D)"),
}

ALIASES = {"/exit": "/quit", "/bye": "/quit", "/clear": "/new", "/reset": "/new", "/regenerate": "/retry"}


@dataclass(frozen=True)
class CommandResult:
    """The text that a command shows, and what happens next; with "answer", `question` is to be answered."""

    text: str
    then: Literal["listen", "answer", "leave"] = "listen"
    question: str = ""


def is_command(line: str) -> bool:
    """True for a line that begins with a slash; a space before it makes it a message."""
    return line.startswith("/")


def run_command(conversation: Conversation, line: str) -> CommandResult:
    """Run the command in `line`; one that cannot be run changes nothing, and its text says why."""
    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    if name in COMMANDS and argument and not COMMANDS[name][0]:
        return CommandResult(f"{name} takes nothing after it")
    try:
        return _run(conversation, name, argument)
    except QloraDpoError as error:
        return CommandResult(str(error))


def _run(conversation: Conversation, name: str, argument: str) -> CommandResult:
    match name:
        case "/help":
            return CommandResult(_help())
        case "/new":
            clear_history(conversation)
            return CommandResult("a new conversation")
        case "/system":
            return CommandResult(_system(conversation, argument))
        case "/set":
            return CommandResult(_set(conversation, argument.split()))
        case "/base" | "/both" | "/reward" if not conversation.has_adapter:
            return CommandResult(f"{conversation.title} is a full model: there is no adapter to switch off")
        case "/base":
            conversation.variants = ("tuned",) if conversation.variants == ("base",) else ("base",)
            return CommandResult(f"the {conversation.variants[0]} model answers from here on")
        case "/both":
            conversation.variants = ("tuned",) if len(conversation.variants) == 2 else ("tuned", "base")
            both = len(conversation.variants) == 2
            return CommandResult(f"the tuned {'and the base model answer' if both else 'model answers'} from here on")
        case "/retry":
            return _retry(conversation)
        case "/reward":
            return CommandResult(_rewards(conversation))
        case "/better":
            return CommandResult(_better(conversation, argument))
        case "/undo":
            question = undo_last_turn(conversation)
            return CommandResult(
                "there is nothing to undo" if question is None else f"taken back: {_shorten(question)}"
            )
        case "/save":
            return CommandResult(_save(conversation, argument))
        case "/quit":
            return CommandResult("", "leave")
        case _:
            return CommandResult(_unknown(name))


def _help() -> str:
    lines = [f"  {f'{name} {arguments}':21}{effect}" for name, (arguments, effect) in COMMANDS.items()]
    keys = (
        "Ctrl+C stops a reply and keeps what was said. To send a line that begins with /, put a space before it. "
        'A line that ends in \\ goes on in the next; between two """ a message has as many lines as you like.'
    )
    return "\n".join([*lines, keys])


def _unknown(name: str) -> str:
    close = [ALIASES[name]] if name in ALIASES else difflib.get_close_matches(name, COMMANDS, n=1)
    return f"no command {name}; did you mean {close[0]}?" if close else f"no command {name}; /help lists them"


def _system(conversation: Conversation, text: str) -> str:
    if not text:
        return f"system prompt: {conversation.system}" if conversation.system else "no system prompt of yours is set"
    conversation.system = None if text == "none" else text
    return "system prompt removed" if text == "none" else f"system prompt: {text}"


def _set(conversation: Conversation, words: Sequence[str]) -> str:
    settings = conversation.settings
    if not words:
        return ", ".join(f"{name} {getattr(settings, name)}" for name in SAMPLING_PARAM_NAMES)
    key = words[0].lstrip("-").replace("-", "_")
    if key not in SAMPLING_PARAM_NAMES:
        close = difflib.get_close_matches(key, SAMPLING_PARAM_NAMES, n=1)
        return f"no setting {words[0]}; " + (
            f"did you mean {close[0]}?" if close else f"there are {', '.join(SAMPLING_PARAM_NAMES)}"
        )
    if len(words) != 2:
        return f"write /set {key} VALUE; it is {getattr(settings, key)} now"
    conversation.settings = with_setting(settings, key, words[1])
    if key == "seed":
        conversation.draws = 0
    return f"{key} is {getattr(conversation.settings, key)} now"


def with_setting(settings: SamplingParams, key: str, text: str) -> SamplingParams:
    """`settings` with `key` set to the number in `text`; raises RecipeError if it is no number or out of range."""
    kind = type(getattr(settings, key))
    try:
        value = kind(text)
    except ValueError as error:
        expected = "a whole number" if kind is int else "a number"
        raise RecipeError(f"{key} is {text}; it must be {expected}") from error
    return replace(settings, **{key: value})


def _retry(conversation: Conversation) -> CommandResult:
    question = undo_last_turn(conversation)
    if question is None:
        return CommandResult("there is nothing to retry")
    greedy = conversation.settings.temperature == 0
    return CommandResult("temperature is 0, so the answer is the same again" if greedy else "", "answer", question)


def _rewards(conversation: Conversation) -> str:
    from qlora_dpo.talk.reward import adapter_beta, implicit_reward

    replies = latest_replies(conversation)[-len(conversation.variants) :]
    if not replies:
        return "there is no answer yet"
    beta = adapter_beta(None) if conversation.beta is None else conversation.beta
    lines = []
    for reply in replies:
        reward = implicit_reward(
            conversation.model,
            conversation.tokenizer,
            conversation.device,
            conversation.last_prompt,
            reply.text,
            reply.ended,
        )
        nats = f"{beta:g} * ({reward.tuned:.2f} - {reward.base:.2f}) nats"
        lines.append(f"{reply.variant}: reward {reward.at_beta(beta):+.3f} = {nats}, {reward.tokens} tokens")
    if conversation.beta is None:
        lines.append(f"(what beta the adapter was trained with is not known; {beta:g} is the usual one)")
    return "\n".join(lines)


def _better(conversation: Conversation, argument: str) -> str:
    """Append a pair of the last two replies to the file; the conversation goes on from the better one."""
    side, _, name = argument.partition(" ")
    path = Path(name.strip()).expanduser() if name.strip() else conversation.preference_file
    if side not in ("a", "b") or path is None:
        return "write /better a FILE or /better b FILE, for example /better a pairs.jsonl"
    last_two = latest_replies(conversation)[-2:]
    if len(last_two) < 2:
        other = "/both and /retry give" if conversation.has_adapter else "/retry gives"
        return f"there are no two answers to the last message; {other} another one"
    chosen, rejected = last_two if side == "a" else reversed(last_two)
    append_pair(
        path, conversation.last_prompt, _text_and_author(conversation, chosen), _text_and_author(conversation, rejected)
    )
    conversation.preference_file = path
    conversation.messages[-1] = {"role": "assistant", "content": chosen.text}
    return f"appended to {path}: {side} is better; the conversation goes on from it"


def _text_and_author(conversation: Conversation, reply: Reply) -> tuple[str, str]:
    """The text of a reply, and the model that wrote it."""
    return reply.text, f"{conversation.title}, adapter off" if reply.variant == "base" else conversation.title


def _save(conversation: Conversation, name: str) -> str:
    if not name:
        return "write /save FILE, for example /save chat.json"
    if not conversation.messages:
        return "there is nothing to save yet"
    path = Path(name).expanduser()
    value = {"model": conversation.title, "messages": transcript(conversation)}
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    except FileExistsError:
        return f"{path} exists and is never overwritten; choose another name"
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}"
    return f"saved {len(conversation.messages)} messages to {path}"


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."
