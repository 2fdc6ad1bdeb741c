"""`qlora-dpo verify`: checks that a run, an adapter or a merged model is still as it was written."""

from collections.abc import Iterator
from pathlib import Path

import click

from qlora_dpo.cli.options import base_model_option


@click.command("verify", short_help="Check a run, an adapter or a merged model against its manifest and base.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@base_model_option
def verify_command(folder: Path, base_model: str | None) -> None:
    """Check every file of DIR, a run, an adapter or a merged model, against its manifest, and the base of an adapter.

    \b
    qlora-dpo verify adapters/hh
    """
    from qlora_dpo.errors import RecipeError, RunError

    folder = folder.expanduser()
    damaged, parts = 0, 0
    for part, damage in _damage_by_part(folder, base_model):
        click.echo(f"{part}: {damage or 'as it was written'}")
        damaged, parts = damaged + bool(damage), parts + 1
    if not parts:
        problem = (
            "holds no adapter, no checkpoint and no merged model" if folder.is_dir() else "there is no such folder"
        )
        raise RecipeError(f"{folder}: {problem}; name the folder of a run or of a merged model")
    if damaged:
        raise RunError(
            f"{folder}: {damaged} of {parts} parts cannot be trusted; take them from a backup, or make them again"
        )


def _damage_by_part(folder: Path, base_model: str | None) -> Iterator[tuple[str, str]]:
    """The parts of `folder`, each with a description of its damage, empty if it is intact."""
    from qlora_dpo.manifest import find_damage
    from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME
    from qlora_dpo.training.checkpoint.integrity import checkpoint_damage

    if (folder / ADAPTER_CONFIG_NAME).is_file():
        yield "adapter", find_damage(folder, required=ADAPTER_SAFE_WEIGHTS_NAME)
        yield "base", _base_damage(folder, base_model)
    elif (folder / "merge.json").is_file():
        yield "merged model", find_damage(folder, required="config.json")
    elif (folder / "export.json").is_file():
        yield "export", find_damage(folder, required="export.json")
    for checkpoint in sorted((folder / "checkpoints").glob("step-*")):
        yield f"checkpoints/{checkpoint.name}", checkpoint_damage(checkpoint)


def _base_damage(folder: Path, base_model: str | None) -> str:
    """Why the base, fetched if it is not cached, is not the one that the adapter was trained on; empty if it is."""
    from qlora_dpo.data.dialogue import sanitize_text
    from qlora_dpo.errors import QloraDpoError
    from qlora_dpo.model.sources import find_base

    try:
        run = find_base(folder, base_model).run
    except QloraDpoError as error:
        return sanitize_text(str(error).removeprefix(f"{folder}: "))
    return "" if run is not None else "run.json is missing, which would say on which weights it was trained"
