"""Ollama's Modelfile for an exported model: the chat template in Ollama's language, and the stop string."""

from typing import Any

from qlora_dpo.data.dialogue import Message
from qlora_dpo.data.templates.chat_template import render_chats

CHATML = """\
{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""

PROBE_CHAT: list[Message] = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]
CHATML_PROBE_TEXT = (
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n"
)


def ollama_modelfile(file: str, tokenizer: Any) -> str:
    """The Modelfile for the GGUF `file`.

    A ChatML template is written out with its default system prompt. For any other one Ollama matches the template in
    the GGUF file with one of its own.
    """
    lines = [f"FROM ./{file}"]
    if tokenizer.chat_template and render_chats(tokenizer, [PROBE_CHAT], answered=False)[0] == CHATML_PROBE_TEXT:
        lines.append(f'TEMPLATE """{CHATML}"""')
        prompt = render_chats(tokenizer, [PROBE_CHAT[1:2]], answered=False)[0]
        system = (
            prompt.partition("<|im_start|>user\n")[0].removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
        )
        if system and '"""' not in system:
            lines.append(f'SYSTEM """{system}"""')
    if tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    return "\n".join(lines) + "\n"
