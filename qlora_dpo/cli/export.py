"""`qlora-dpo export`: a full model in the format of another engine."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from qlora_dpo.deploy.export import ExportFormat
    from qlora_dpo.deploy.gguf_tensors import Quant


@click.command("export", short_help="Write a full model as GGUF, for llama.cpp, Ollama and others.")
@click.argument("model")
@click.option(
    "--to",
    type=click.Choice(["gguf", "ollama"]),
    default="gguf",
    show_default=True,
    help="A GGUF file, or one with the Modelfile that `ollama create` reads.",
)
@click.option(
    "--quant",
    type=click.Choice(["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]),
    default="f16",
    show_default=True,
    help="Type of the matrices; embeddings and head have 8 bits at least.",
)
@click.option(
    "-o", "output", metavar="DIR", type=click.Path(path_type=Path), help="Folder to write [exported/NAME-QUANT]"
)
def export_command(model: str, to: "ExportFormat", quant: "Quant", output: Path | None) -> None:
    """Write MODEL, a merged folder, a model folder or a hub name, as GGUF with tokenizer and chat template.

    Llama, Qwen2 and Qwen3 with byte-level BPE. The file is read back and compared before it is kept.

    \b
    qlora-dpo export merged/hh
    qlora-dpo export merged/hh --to ollama --quant q8_0
    """
    from qlora_dpo.deploy import export as exporting
    from qlora_dpo.deploy.merge import check_output_free

    source = exporting.full_model(model)
    target = output.expanduser() if output else Path("exported") / f"{exporting.exported_name(source)}-{quant}"
    check_output_free(target)
    click.echo(f"exporting {model} into {target}", err=True)
    exported = exporting.export_model(source, target, to, quant)
    click.echo(
        f"{exported.file}: {exported.bytes / 1e6:,.1f} MB, {exported.tensors} tensors in {quant}\n"
        "Read back: words, merges and template are the tokenizer's; the largest relative error of a tensor is "
        f"{exported.error:.2g}."
    )
    if to == "ollama":
        folder = shlex.quote(str(target))
        click.echo(f"\nollama create {exporting.exported_name(source).lower()} -f {folder}/Modelfile")
