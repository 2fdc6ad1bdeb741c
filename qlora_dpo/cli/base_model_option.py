"""The option `--base-model` of every command that opens adapters."""

import click

base_model_option = click.option(
    "--base-model",
    metavar="MODEL",
    help="Where an adapter's base lies now, a folder or a hub name, if that is not where the adapter says.",
)
