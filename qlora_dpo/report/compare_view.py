"""Shows answers of several voices to the same prompts side by side: on a terminal, and as one page of HTML."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.report.page import render_page
from qlora_dpo.report.samples import format_prompt

Record = Mapping[str, Any]


def comparison_columns(prompts: Sequence[Record]) -> RenderableType:
    """Every prompt with a column for each answer; the records are those of `compare --json`."""
    return Group(*(_prompt_columns(each) for each in prompts))


def _prompt_columns(record: Record) -> RenderableType:
    columns = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, header_style="dim", show_edge=False)
    for said in record["answers"]:
        columns.add_column(f"{sanitize_text(said['voice'])}, {said['tokens']} tokens", ratio=1, overflow="fold")
    columns.add_row(*(_reply_text(said) for said in record["answers"]))
    columns.add_row(*(Text(_reward_lines(said), style="dim") for said in record["answers"]))
    if any("token_rewards" in said for said in record["answers"]):
        columns.add_row(*(_token_lines(said) for said in record["answers"]))
    return Group(Text(format_prompt(record["prompt"]), style="bold"), Padding(columns, (0, 0, 1, 2)))


def _reply_text(reply: Record) -> Text:
    text = Text(sanitize_text(reply["text"]).strip() or "(nothing)")
    if not reply["ended"]:
        text.append(" ... (stopped by the token limit)", style="dim")
    return text


def _reward_lines(reply: Record) -> str:
    """The reward under each adapter; its name is needed only where there are several."""
    several = len(reply["rewards"]) > 1
    return "\n".join(
        f"reward {f'by {sanitize_text(name)} ' if several else ''}{each['reward']:+z.3f}, {each['per_token']:+z.4f} a token"
        for name, each in reply["rewards"].items()
    )


def _token_lines(reply: Record) -> Text:
    """One token a line with its reward under each adapter."""
    lines = Text()
    for token in reply["token_rewards"]:
        for value in token["rewards"].values():
            lines.append(f"{value:+z8.3f} ", style="green" if value > 0 else "red" if value < 0 else "dim")
        lines.append(f" {sanitize_text(repr(token['token']))}\n")
    return lines


def comparison_page(record: Record) -> str:
    """The whole of `compare --json` as a page that needs nothing from elsewhere."""
    prompts = [{**each, "text": format_prompt(each["prompt"], 10_000)} for each in record["prompts"]]
    most = max(
        (
            abs(value)
            for each in prompts
            for said in each["answers"]
            for token in said.get("token_rewards", ())
            for value in token["rewards"].values()
        ),
        default=0.0,
    )
    return render_page("compare.html.jinja", record=record, prompts=prompts, most=most or 1.0)
