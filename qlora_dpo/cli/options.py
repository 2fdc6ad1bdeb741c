"""Options that several commands have: `--set` for a recipe, `--base-model` and `--dtype` for models that are opened.

The keys of `--set` are those of the recipe; `dpo.`, as other tools call the table, means `objective.`.
"""

import click

ALIAS_PREFIX, OBJECTIVE_PREFIX = "dpo.", "objective."


def translate_aliases(context: click.Context, option: click.Parameter, assignments: tuple[str, ...]) -> tuple[str, ...]:
    """The assignments with `objective.` for `dpo.`; each key that was translated is reported once on stderr."""
    aliased = [assignment for assignment in assignments if assignment.startswith(ALIAS_PREFIX)]
    for key in dict.fromkeys(assignment.partition("=")[0].strip() for assignment in aliased):
        click.echo(f"{key}: read as {OBJECTIVE_PREFIX}{key.removeprefix(ALIAS_PREFIX)}", err=True)
    return tuple(
        OBJECTIVE_PREFIX + assignment.removeprefix(ALIAS_PREFIX) if assignment in aliased else assignment
        for assignment in assignments
    )


set_option = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    callback=translate_aliases,
    help="Change a key of the recipe: lora.r=8",
)

base_model_option = click.option(
    "--base-model",
    metavar="MODEL",
    help="Where an adapter's base lies now, a folder or a hub name, if that is not where the adapter says.",
)

dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "bf16", "fp16", "fp32"]),
    default="auto",
    show_default=True,
    help="What models compute in.",
)
