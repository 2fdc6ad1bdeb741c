"""The command line: runs a command, and turns every failure into one sentence and an exit code."""

import signal
import sys
from collections.abc import Sequence
from types import FrameType

import click

from qlora_dpo import __version__
from qlora_dpo.cli.chat import chat_command
from qlora_dpo.cli.check import check_command
from qlora_dpo.cli.compare import compare_command
from qlora_dpo.cli.data import data_group
from qlora_dpo.cli.eval import eval_command
from qlora_dpo.cli.export import export_command
from qlora_dpo.cli.failure import report_error
from qlora_dpo.cli.init import init_command
from qlora_dpo.cli.merge import merge_command
from qlora_dpo.cli.pairs import pairs_command
from qlora_dpo.cli.push import push_command
from qlora_dpo.cli.report import report_command
from qlora_dpo.cli.runs import runs_command
from qlora_dpo.cli.serve import serve_command
from qlora_dpo.cli.startup.allocator import limit_onednn_caches, use_expandable_segments
from qlora_dpo.cli.startup.closed_output import lasting_output
from qlora_dpo.cli.startup.quiet import quiet_libraries
from qlora_dpo.cli.sweep import sweep_command
from qlora_dpo.cli.train import train_command
from qlora_dpo.cli.verify import verify_command
from qlora_dpo.errors import EXIT_FAILURE, EXIT_OK
from qlora_dpo.tracking.console import console_logging


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="qlora-dpo %(version)s")
def commands() -> None:
    """Tune a language model on preference pairs with QLoRA and DPO.

    \b
    qlora-dpo init my-recipe.toml            a recipe of your own to start from
    qlora-dpo check my-recipe.toml           what it does, and whether it fits
    qlora-dpo train recipes/quickstart.toml  a recipe becomes an adapter
    qlora-dpo merge                          the newest adapter as a full model
    qlora-dpo chat                           talk to either
    qlora-dpo verify adapters/quickstart     is it still what was written?
    qlora-dpo export merged/hh               write it as GGUF, for other engines
    qlora-dpo push adapters/hh me/hh         send it to a hub
    qlora-dpo data show pairs.jsonl          look at data, lint and split it
    """


# Modules of commands import click and nothing heavy at the top, so that `--help` stays under 0.3 seconds.
commands.add_command(init_command)
commands.add_command(check_command)
commands.add_command(train_command)
commands.add_command(sweep_command)
commands.add_command(merge_command)
commands.add_command(chat_command)
commands.add_command(serve_command)
commands.add_command(verify_command)
commands.add_command(data_group)
commands.add_command(pairs_command)
commands.add_command(export_command)
commands.add_command(push_command)
commands.add_command(eval_command)
commands.add_command(compare_command)
commands.add_command(report_command)
commands.add_command(runs_command)


def _raise_interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 usage, 3 gate, 4 does not fit, 130 interrupted."""
    quiet_libraries()
    use_expandable_segments()
    limit_onednn_caches()
    # SIGTERM acts like Ctrl+C, so that half-written folders are removed
    signal.signal(signal.SIGTERM, _raise_interrupt)
    with lasting_output() as is_reader_gone, console_logging():
        code = _run_command(arguments)
        # as click does, and without a sentence, since the reader went away on purpose
        return EXIT_FAILURE if code == EXIT_OK and is_reader_gone() else code


def _run_command(arguments: Sequence[str] | None) -> int:
    try:
        code = commands.main(
            args=None if arguments is None else list(arguments), prog_name="qlora-dpo", standalone_mode=False
        )
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing may interrupt the report
        return report_error(error)
    return code if isinstance(code, int) else EXIT_OK
