"""Shows held-out prompts with the answers of base and tuned model side by side."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.run_folder import Record

MAX_PROMPT_CHARACTERS = 600  # a held-out dialogue can be pages long; the answer replies to its end


def samples_view(samples: Sequence[Record], show: int) -> RenderableType:
    """The first `show` samples: each prompt, and below it the answers of base and tuned model."""
    return Group(*(_sample_view(sample) for sample in samples[:show]))


def format_prompt(prompt: Sequence[Mapping[str, str]], characters: int = MAX_PROMPT_CHARACTERS) -> str:
    """A prompt as plain text: a single question, or every turn with its role; the front of a long one is cut off."""
    turns = [turn for turn in prompt if turn["role"] != "system"]
    if len(turns) == 1:
        text = turns[0]["content"].strip()
    else:
        text = "\n".join(f"{turn['role']}: {turn['content'].strip()}" for turn in turns)
    text = sanitize_text(text)
    return text if len(text) <= characters else f"... {text[-characters:].lstrip()}"


def _sample_view(sample: Record) -> RenderableType:
    answers = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, header_style="dim", show_edge=False)
    for who in ("base", "tuned"):
        answers.add_column(f"{who}, {sample[f'{who}_tokens']} tokens", ratio=1, overflow="fold")
    answers.add_row(*(_completion_text(sample, who) for who in ("base", "tuned")))
    return Group(Text(format_prompt(sample["prompt"]), style="bold"), Padding(answers, (0, 0, 1, 2)))


def _completion_text(sample: Record, who: str) -> Text:
    """The text of a model, without terminal escapes; its brackets are not interpreted as markup."""
    text = Text(sanitize_text(str(sample[who])).strip() or "(nothing)")
    if not sample.get(f"{who}_ended", True):
        text.append(" ... (stopped by the token limit)", style="dim")
    return text
