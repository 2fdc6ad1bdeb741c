"""`qlora-dpo chat`: a conversation with a model, or one reply to a message from a pipe."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_dpo.cli.options import base_model_option
from qlora_dpo.cli.startup.libraries import import_libraries
from qlora_dpo.errors import RecipeError
from qlora_dpo.talk.sampling import SamplingParams, resolve_sampling_params

if TYPE_CHECKING:
    from qlora_dpo.adapter import OpenedModel
    from qlora_dpo.talk.conversation import Conversation


@click.command("chat", short_help="Talk to an adapter, a merged model or a hub model.")
@click.argument("model", required=False)
@click.option("-s", "--system", metavar="TEXT", help="System prompt; absent: what the model's template puts there.")
@click.option(
    "--temperature",
    type=float,
    help=f"0 takes the likeliest token every time. [default: the model's own, else {SamplingParams.temperature}]",
)
@click.option(
    "--top-p",
    type=float,
    help="Sample from the likeliest tokens with this probability. "
    f"[default: the model's own, else {SamplingParams.top_p}]",
)
@click.option(
    "--max-new-tokens",
    type=int,
    help=f"Longest reply, in tokens. [default: {SamplingParams.max_new_tokens}, if it fits]",
)
@click.option("--seed", type=int, help="Start of the random draws. [default: another one in every chat]")
@click.option("-c", "--continue", "go_on", is_flag=True, help="Go on with the last conversation.")
@click.option("--base", is_flag=True, help="Begin with the adapter switched off.")
@base_model_option
def chat_command(
    model: str | None, system: str | None, go_on: bool, base: bool, base_model: str | None, **given: Any
) -> None:
    """Talk to MODEL: an adapter folder, a merged folder or a hub name; absent: the newest adapter.

    \b
    qlora-dpo chat
    qlora-dpo chat merged/quickstart -s "Answer like a pirate."
    qlora-dpo chat -c
    echo "How do I kill time at the airport?" | qlora-dpo chat --temperature 0
    """
    SamplingParams(**{name: value for name, value in given.items() if value is not None})
    question = None if sys.stdin is not None and sys.stdin.isatty() else _read_stdin()
    from qlora_dpo.run_folder import find_model_folder

    if model is not None or not go_on:
        find_model_folder(model)  # a wrong name is told before torch is imported, which takes seconds
    import_libraries()
    from qlora_dpo.adapter import open_model
    from qlora_dpo.talk.chat import reply_to_pipe, run_chat
    from qlora_dpo.talk.chat_history import load_chat

    last = load_chat() if go_on else None
    target = last.model if last and model is None else model
    conversation = _make_conversation(open_model(target, base_model=base_model), system, base, given)
    if last is not None:
        conversation.messages, conversation.system = list(last.messages), system or last.system
    if question is None:
        run_chat(conversation)
    else:
        reply_to_pipe(conversation, question)


def _read_stdin() -> str:
    """The message on stdin; raises RecipeError if there is none."""
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise RecipeError(f"stdin is not UTF-8 text (byte {error.start}); send the question as UTF-8") from error
    if not text:
        raise RecipeError('stdin is empty; pipe a question in, as in: echo "How are you?" | qlora-dpo chat')
    return text


def _make_conversation(opened: "OpenedModel", system: str | None, base: bool, given: dict[str, Any]) -> "Conversation":
    from peft import PeftModel

    from qlora_dpo.talk.conversation import Conversation
    from qlora_dpo.talk.generate import context_tokens

    title = _title(opened.folder) if opened.folder else opened.source.name
    adapter = isinstance(opened.model, PeftModel)
    if base and not adapter:
        raise RecipeError(f"--base: {title} is a full model, there is no adapter to switch off; leave --base out")
    return Conversation(
        title=title,
        model=opened.model.eval(),
        tokenizer=opened.tokenizer,
        device=opened.device,
        settings=resolve_sampling_params(
            getattr(opened.model, "generation_config", None), context_tokens(opened.model), given
        ),
        variants=("base",) if base else ("tuned",) if adapter else ("model",),
        system=system,
        beta=getattr(opened.recipe.objective, "beta", None) if opened.recipe else None,
        target=str(opened.folder.resolve()) if opened.folder else opened.source.name,
    )


def _title(folder: Path) -> str:
    """The folder as the user would type it: relative to the working directory if it lies below."""
    absolute = folder.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(folder)
