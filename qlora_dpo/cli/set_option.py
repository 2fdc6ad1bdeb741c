"""The option `--set`, in the words of the recipe: what other tools call the table `dpo` is `objective` here."""

import click

ALIAS_PREFIX, OBJECTIVE_PREFIX = "dpo.", "objective."


def translate_aliases(context: click.Context, option: click.Parameter, assignments: tuple[str, ...]) -> tuple[str, ...]:
    """Each `KEY=VALUE` with the table's name here; a key that had the other one is told on stderr, once."""
    for key in dict.fromkeys(each.partition("=")[0].strip() for each in assignments if each.startswith(ALIAS_PREFIX)):
        click.echo(f"{key}: read as {OBJECTIVE_PREFIX}{key.removeprefix(ALIAS_PREFIX)}", err=True)
    return tuple(
        OBJECTIVE_PREFIX + each.removeprefix(ALIAS_PREFIX) if each.startswith(ALIAS_PREFIX) else each
        for each in assignments
    )


set_option = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    callback=translate_aliases,
    help="Change a key of the recipe: lora.r=8",
)
