"""The option `--set`, in the words of the recipe: what other tools call the table `dpo` is `objective` here."""

import click

OTHERS, OURS = "dpo.", "objective."


def in_our_words(context: click.Context, option: click.Parameter, assignments: tuple[str, ...]) -> tuple[str, ...]:
    """Each `KEY=VALUE` with the table's name here; a key that had the other one is told on stderr, once."""
    for key in dict.fromkeys(each.partition("=")[0].strip() for each in assignments if each.startswith(OTHERS)):
        click.echo(f"{key}: read as {OURS}{key.removeprefix(OTHERS)}", err=True)
    return tuple(OURS + each.removeprefix(OTHERS) if each.startswith(OTHERS) else each for each in assignments)


set_option = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    callback=in_our_words,
    help="Change a key of the recipe: lora.r=8",
)
