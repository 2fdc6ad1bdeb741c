"""`eval --tasks` runs tasks of lm-eval with the base and with the tuned model."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import saved_adapters
import torch
from cli_sandbox import Workplace
from hub import Hub
from peft import PeftModel
from tiny_run import LIBRARIES_WARN
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_dpo.cli import main

pytestmark = LIBRARIES_WARN

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval, the extra `tasks`, is not installed")

WORDS = ("cat", "dog", "ball", "rice", "book")
TASK = """
task: own_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
"""


def rows() -> list[dict[str, Any]]:
    return [
        {"question": f"Where is the {WORDS[n % 5]} {n}?", "choices": [f"in the {w}" for w in WORDS], "label": n % 4}
        for n in range(12)
    ]


def accuracy(made: Path, tuned: bool) -> float:
    """How often the right choice is the likeliest, by transformers and PEFT alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, made / "a").eval() if tuned else model.eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(made / "a")
    right = 0
    for row in rows():
        scores = []
        for choice in row["choices"]:
            start = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
            whole = tokenizer(f"{row['question']} {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logp[at - 1, whole[at]]) for at in range(len(start), len(whole))))
        right += scores.index(max(scores)) == row["label"]
    return right / len(rows())


@needs_lm_eval
def test_a_task_of_ones_own_scores_what_transformers_and_peft_alone_say(tmp_path: Path) -> None:
    saved_adapters.save_adapter(tmp_path / "a", saved_adapters.save_base(tmp_path / "base"), "none", size=1.0)
    (tmp_path / "tasks").mkdir()
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (tmp_path / "tasks" / "own.yaml").write_text(TASK.format(file=file))
    words = ("--tasks", "own_choices", "--task-path", str(tmp_path / "tasks"), "--dtype", "fp32", "--json")
    with Hub(tmp_path) as hub:
        done = Workplace(tmp_path / "work", hub).run("eval", str(tmp_path / "a"), *words, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["tasks"]["own_choices"]["acc,none"]
    assert (found["base"], found["tuned"]) == (accuracy(tmp_path, False), accuracy(tmp_path, True))
    assert found["base_stderr"] > 0


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # lm-eval's own, of many kinds
def test_a_task_that_is_not_there_is_refused_before_anything_is_loaded(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["eval", str(own), "--tasks", "hellaswagg"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "qlora-dpo: --tasks hellaswagg: lm-eval has no such task; did you mean hellaswag?"


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed here")
def test_without_lm_eval_it_says_what_to_install(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["eval", str(own), "--tasks", "hellaswag"]) == 2
    assert capsys.readouterr().err == (
        "qlora-dpo: --tasks needs lm-eval, which is not installed: pip install 'qlora_dpo[tasks]'\n"
    )
