"""Shows the answers of several models to the same prompts side by side, in a terminal and as one HTML page."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.report.run_page import render_page
from qlora_dpo.report.samples import format_prompt
from qlora_dpo.run_folder import Record


def comparison_columns(prompts: Sequence[Record]) -> RenderableType:
    """Every prompt, with one column for each answer; `prompts` are those of `compare --json`."""
    return Group(*(_prompt_columns(record) for record in prompts))


def _prompt_columns(record: Record) -> RenderableType:
    columns = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, header_style="dim", show_edge=False)
    for reply in record["answers"]:
        columns.add_column(f"{sanitize_text(reply['voice'])}, {reply['tokens']} tokens", ratio=1, overflow="fold")
    columns.add_row(*(_reply_text(reply) for reply in record["answers"]))
    columns.add_row(*(Text(_reward_lines(reply), style="dim") for reply in record["answers"]))
    if any("token_rewards" in reply for reply in record["answers"]):
        columns.add_row(*(_token_lines(reply) for reply in record["answers"]))
    return Group(Text(format_prompt(record["prompt"]), style="bold"), Padding(columns, (0, 0, 1, 2)))


def _reply_text(reply: Record) -> Text:
    text = Text(sanitize_text(reply["text"]).strip() or "(nothing)")
    if not reply["ended"]:
        text.append(" ... (stopped by the token limit)", style="dim")
    return text


def _reward_lines(reply: Record) -> str:
    """The reward under each adapter; adapters are named only if there are several."""
    named = len(reply["rewards"]) > 1
    return "\n".join(
        f"reward {f'by {sanitize_text(name)} ' if named else ''}{reward['reward']:+z.3f}, "
        f"{reward['per_token']:+z.4f} a token"
        for name, reward in reply["rewards"].items()
    )


def _token_lines(reply: Record) -> Text:
    """One line per token, with its reward under each adapter."""
    lines = Text()
    for token in reply["token_rewards"]:
        for value in token["rewards"].values():
            lines.append(f"{value:+z8.3f} ", style="green" if value > 0 else "red" if value < 0 else "dim")
        lines.append(f" {sanitize_text(repr(token['token']))}\n")
    return lines


def comparison_page(record: Record) -> str:
    """The record of `compare --json` as one self-contained HTML page."""
    prompts = [{**prompt, "text": format_prompt(prompt["prompt"], 10_000)} for prompt in record["prompts"]]
    largest_reward = max(
        (
            abs(value)
            for prompt in prompts
            for reply in prompt["answers"]
            for token in reply.get("token_rewards", ())
            for value in token["rewards"].values()
        ),
        default=0.0,
    )
    return render_page("compare.html.jinja", record=record, prompts=prompts, largest_reward=largest_reward or 1.0)
