"""`qlora-dpo export`: a full model in the format of another engine."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from qlora_dpo.cli.options import base_model_option

if TYPE_CHECKING:
    from qlora_dpo.deploy.export import ExportFormat
    from qlora_dpo.deploy.gguf_adapter import AdapterDtype
    from qlora_dpo.deploy.gguf_tensors import Quant


@click.command("export", short_help="Write a full model as GGUF, for llama.cpp, Ollama and others.")
@click.argument("model")
@click.option(
    "--to",
    type=click.Choice(["gguf", "ollama", "gguf-lora"]),
    default="gguf",
    show_default=True,
    help="A GGUF file, one with the Modelfile that `ollama create` reads, or an adapter alone, for llama.cpp's --lora.",
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
@base_model_option
def export_command(
    model: str, to: "ExportFormat | str", quant: "Quant", output: Path | None, base_model: str | None
) -> None:
    """Write MODEL, a merged folder, a model folder or a hub name, as GGUF with tokenizer and chat template.

    Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, SmolLM3, Gemma 3, Phi-3 and Granite, with byte-level BPE or SentencePiece.
    The file is read back and compared before it is kept. With `--to gguf-lora`, MODEL is an adapter.

    \b
    qlora-dpo export merged/hh
    qlora-dpo export merged/hh --to ollama --quant q8_0
    qlora-dpo export adapters/hh --to gguf-lora
    """
    if to == "gguf-lora":
        _export_adapter(Path(model).expanduser(), quant, output, base_model)
        return
    if base_model is not None:
        raise click.UsageError("--base names the base of an adapter; it needs --to gguf-lora")
    from qlora_dpo.deploy import export as exporting
    from qlora_dpo.deploy.merge import check_output_free
    from qlora_dpo.evaluation.merge_chats import read_chats

    source = exporting.full_model(model)
    target = output.expanduser() if output else Path("exported") / f"{exporting.exported_name(source)}-{quant}"
    check_output_free(target)
    click.echo(f"exporting {model} into {target}", err=True)
    chats = read_chats(source.folder)
    exported = exporting.export_model(source, target, cast("ExportFormat", to), quant, chats)
    click.echo(
        f"{exported.file}: {exported.bytes / 1e6:,.1f} MB, {exported.tensors} tensors in {quant}\n"
        "Read back: words, merges and template are the tokenizer's; the largest relative error of a tensor is "
        f"{exported.error:.2g}."
    )
    if exported.chats.compared:
        which = f"{exported.chats.compared} {exported.chats.kind} chats"
        click.echo(f"llama.cpp: {which} by the file's own template have the tokens of training.")
    else:
        click.echo(f"The tokens of chats were not compared: {exported.chats.not_compared}.")
    if to == "ollama":
        folder = shlex.quote(str(target))
        click.echo(f"\nollama create {exporting.exported_name(source).lower()} -f {folder}/Modelfile")


def _export_adapter(folder: Path, quant: str, output: Path | None, base_model: str | None) -> None:
    """Write the adapter in `folder` alone."""
    if quant not in ("f16", "bf16"):
        raise click.UsageError(f"--quant {quant}: an adapter is written in f16 or bf16")
    from qlora_dpo.deploy.gguf_adapter import export_adapter
    from qlora_dpo.deploy.merge import check_output_free, open_for_merge

    name = folder.resolve().name
    target = output.expanduser() if output else Path("exported") / f"{name}-lora-{quant}"
    check_output_free(target)
    click.echo(f"exporting the adapter {folder} into {target}", err=True)
    opened = open_for_merge(folder, base_model=base_model)
    exported = export_adapter(opened, target, name, cast("AdapterDtype", quant))
    base = opened.source.hub_id or str(opened.source.folder)
    click.echo(
        f"{exported.file}: {exported.bytes / 1e6:,.1f} MB, {exported.layers} layers in {quant}\n"
        f"Read back: the largest relative error of a matrix is {exported.error:.2g}.\n\n"
        f"qlora-dpo export {shlex.quote(base)}   # the base that it is for\n"
        f"llama-cli -m exported/BASE.gguf --lora {shlex.quote(str(exported.file))}"
    )
