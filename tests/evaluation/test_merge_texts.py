"""Texts to compare two models on: what a run sampled is read as it was written."""

import json
from pathlib import Path

import tiny

from qlora_dpo.evaluation.merge_texts import load_comparison_texts


def test_a_line_separator_inside_a_sampled_text_loses_no_sample(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "One\u2028two\u2029three\x85four?"}]
    samples = [{"prompt": prompt, "base": "No.\u2028", "tuned": "Yes."}, {"prompt": prompt, "base": "a", "tuned": "b"}]
    lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in samples)
    (tmp_path / "samples.jsonl").write_text(lines, encoding="utf-8")
    assert load_comparison_texts(tmp_path, None, tiny.tokenizer()).name == "2 sample prompts of the run"
