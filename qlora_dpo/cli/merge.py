"""In the making."""
import click


@click.command()
def merge() -> None:
    """Merge."""
