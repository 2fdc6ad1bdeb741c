"""`qlora-dpo push`: an adapter, a merged model or an export goes to a hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from qlora_dpo.deploy.hub_files import HubFile

PUSH_PARTS = ("model", "card", "run", "samples")


@click.command("push", short_help="Send an adapter or a merged model to a hub.")
@click.argument("folder", metavar="PATH", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REPO")
@click.option("--private/--public", default=True, show_default=True, help="Who can read a repository that is new.")
@click.option(
    "--what",
    "parts",
    type=click.Choice(PUSH_PARTS),
    multiple=True,
    help="Send this part only; may be given several times. [default: model, card and run, without samples]",
)
@click.option("--base", metavar="OWNER/NAME", help="Where others find an adapter's base that was a folder here.")
@click.option("--dry-run", is_flag=True, help="List the files and stop; nothing is sent and nobody is asked.")
def push_command(
    folder: Path, repository: str, private: bool, parts: tuple[str, ...], base: str | None, dry_run: bool
) -> None:
    """Send PATH, an adapter, a merged model or an export, to the repository REPO of a hub, in one commit.

    Files and sizes are listed first. Checkpoints never go; secrets and paths of this machine are taken out. Log in with
    `hf auth login` before. A push that was cut off goes on where it stopped.

    \b
    qlora-dpo push adapters/hh me/hh-adapter --dry-run
    qlora-dpo push merged/hh me/hh --public
    """
    from qlora_dpo.deploy.hub_files import adapter_base_name, collect_hub_files
    from qlora_dpo.deploy.push import check_repo_id, push_files
    from qlora_dpo.report.card import strip_local_paths
    from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME

    folder = folder.expanduser()
    for name in (repository, *([base] if base is not None else [])):
        check_repo_id(name)
    files = collect_hub_files(folder, repository, parts or PUSH_PARTS[:3], base, strip_local_paths)  # type: ignore[arg-type]
    click.echo("\n".join(_file_list_lines(files)), err=not dry_run)
    base_name = adapter_base_name(files) or ""
    if base_name.startswith("pypi:"):
        click.echo(f"its base is {base_name}: qlora-dpo fetches that, other programs need --base OWNER/NAME", err=True)
    if dry_run:
        return
    click.echo(f"sending to {repository}, {'private' if private else 'public'} if it is new", err=True)
    address = push_files(files, repository, f"qlora-dpo push {folder.resolve().name}", private=private)
    click.echo(f"{repository}: {len(files)} files, {address}")
    if any(file.name in (ADAPTER_CONFIG_NAME, "config.json") for file in files):
        click.echo(f"\nqlora-dpo chat {repository}   # talk to it")


def _file_list_lines(files: "Sequence[HubFile]") -> list[str]:
    """A line for each file with its bytes, and one with the sum."""
    rows = [*((f"{file.bytes:,}", file.name) for file in files)]
    rows.append((f"{sum(file.bytes for file in files):,}", f"bytes in {len(files)} files"))
    width = max(len(size) for size, _ in rows)
    return [f"{size:>{width}}  {name}" for size, name in rows]
