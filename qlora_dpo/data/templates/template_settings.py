"""Gives a tokenizer the chat template that a recipe asks for, with its settings, and one that answers can follow."""

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.data.templates.chat_format import detect_chat_format
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.recipe.model import ModelTable

CHATML_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
PLAIN_TEMPLATE = """\
{%- if bos_token is defined and bos_token %}
    {{- bos_token }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- 'Assistant: ' + message['content'] | trim + eos_token + '\\n' }}
    {%- elif message['role'] in ('system', 'user') %}
        {{- message['role'].capitalize() + ': ' + message['content'] | trim + '\\n' }}
    {%- else %}
        {{- raise_exception('has no place for a turn of the role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
"""
_CHATML_MARKS = ("<|im_start|>", "<|im_end|>")
_OPEN_THOUGHTS = ("<think>\\n", "<think>\n", "<think>")
"""How a template's text writes the thoughts that a generation prompt begins."""


def apply_template_settings(tokenizer: Any, table: ModelTable, name: str) -> list[str]:
    """Set `tokenizer.chat_template` as `table` says; returns sentences about what was decided beyond that.

    Settings become a part of the template's text. It is saved beside the adapter and with a merged model, so chat,
    exported files and other programs write the chats that were trained on. A generation prompt that begins a thought,
    behind which the template would not write an answer, is changed to one without. Raises RecipeError for a file that
    is no template, or a setting that the template does not read, and ModelError if the tokenizer lacks the tokens of
    the template.
    """
    if table.chat_template is not None:
        tokenizer.chat_template = _named_template(tokenizer, table.chat_template, name)
    template = tokenizer.chat_template
    if not template:
        return []
    for key in table.chat_template_kwargs:
        if not re.search(rf"\b{re.escape(key)}\b", template):
            raise RecipeError(f"model.chat_template_kwargs: the chat template of {name} reads no {key}; leave it out")
    tokenizer.chat_template = _with_defaults(template, table.chat_template_kwargs)
    return _close_thoughts(tokenizer, table)


def _named_template(tokenizer: Any, choice: str, name: str) -> str:
    """The template that `model.chat_template` names."""
    vocabulary = tokenizer.get_vocab()
    match choice:
        case "chatml":
            if missing := [mark for mark in _CHATML_MARKS if mark not in vocabulary]:
                raise ModelError(
                    f'model.chat_template = "chatml": the tokenizer of {name} has no token {missing[0]}, so a reply '
                    'would not end; write "plain"'
                )
            tokenizer.eos_token = _CHATML_MARKS[1]
            return CHATML_TEMPLATE
        case "plain":
            if tokenizer.eos_token is None:
                raise ModelError(
                    f'model.chat_template = "plain": the tokenizer of {name} has no end-of-sequence token, so a reply '
                    "would not end; name a template of your own, with a token that ends an answer"
                )
            return PLAIN_TEMPLATE
    try:
        text = Path(choice).read_text(encoding="utf-8")
        _compile_jinja_template(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"model.chat_template: {choice} cannot be read: {error}") from error
    except TemplateSyntaxError as error:
        raise RecipeError(
            f"model.chat_template: {choice}, line {error.lineno}: is no Jinja template: {sanitize_text(str(error))}"
        ) from error
    return text


def _with_defaults(template: str, settings: dict[str, Any]) -> str:
    """The template with its variables set where the caller does not pass them; JSON values are Jinja's too."""
    lines = (
        f"{{%- if {key} is not defined %}}{{%- set {key} = {json.dumps(value, ensure_ascii=False)} %}}{{%- endif %}}"
        for key, value in settings.items()
    )
    return "".join(lines) + template


def _close_thoughts(tokenizer: Any, table: ModelTable) -> list[str]:
    """Change the template if an answer does not follow its generation prompt, and does without a thought in it."""
    template = tokenizer.chat_template
    if _is_usable(tokenizer):
        return []
    if "enable_thinking" in template and "enable_thinking" not in table.chat_template_kwargs:
        tokenizer.chat_template = _with_defaults(template, {"enable_thinking": False})
        if _is_usable(tokenizer):
            return [
                "template: enable_thinking = false, since its answers do not begin where the prompt of a thought ends; "
                "the adapter's own template has it"
            ]
    for opening in _OPEN_THOUGHTS:
        head, found, tail = template.rpartition(opening)
        tokenizer.chat_template = head + tail
        if found and _is_usable(tokenizer):
            return [
                "template: the prompt of an answer no longer ends with <think>, which the template leaves out of "
                "answered chats; the adapter's own template has it so"
            ]
    tokenizer.chat_template = template
    return []


def _is_usable(tokenizer: Any) -> bool:
    try:
        detect_chat_format(tokenizer)
    except ModelError:
        return False
    return True
