"""`compare` lets base and adapters speak from one loaded model, and says the implicit reward of what they said."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import saved_adapters
import torch
from html_tags import Tags
from peft import PeftModel
from tiny_run import LIBRARIES_WARN
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_dpo.cli import main
from qlora_dpo.cli.compare import _read_prompts
from qlora_dpo.report.compare_view import comparison_page

pytestmark = LIBRARIES_WARN

ASKED = ("How do I find the garden?", "Is it far?")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two adapters of it, `one` and `two`, and one of another base, `other`."""
    home = tmp_path_factory.mktemp("compare")
    base = saved_adapters.save_base(home / "base")
    saved_adapters.save_adapter(home / "one", base, "none", size=0.6)
    saved_adapters.save_adapter(home / "two", base, "none", size=0.2)
    saved_adapters.save_adapter(home / "other", saved_adapters.save_base(home / "base2", seed=5), "none")
    return home


def compared(capsys: pytest.CaptureFixture[str], made: Path, *arguments: str) -> dict[str, Any]:
    asked = [word for each in ASKED for word in ("-p", each)]
    names = [str(made / each) for each in arguments if not each.startswith("-")]
    options = [each for each in arguments if each.startswith("-")]
    short = ("--max-new-tokens", "12", "--dtype", "fp32", "--json")
    assert main(["compare", *names, *asked, *options, *short]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def plain(made: Path, adapter: str, question: str) -> tuple[str, float, list[float]]:
    """The adapter's greedy answer, its reward and that of each token, by transformers and PEFT alone."""
    base = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, made / adapter).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(made / adapter)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    ids = torch.tensor([prompt])
    whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    answer = whole[0, len(prompt) :]

    @torch.no_grad()
    def logps() -> torch.Tensor:
        rows = model(input_ids=whole).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        return rows.gather(-1, answer[:, None])[:, 0]

    tuned = logps()
    with model.disable_adapter():
        ratio = 0.1 * (tuned - logps())
    return tokenizer.decode(answer, skip_special_tokens=True), float(ratio.sum()), ratio.tolist()


def test_answers_and_rewards_are_those_of_transformers_and_peft_alone(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(capsys, made, "one", "two", "--tokens")
    assert [each["name"] for each in found["adapters"]] == ["one", "two"]
    for prompt, question in zip(found["prompts"], ASKED, strict=True):
        assert [said["voice"] for said in prompt["answers"]] == ["base", "one", "two"]
        for name, said in zip(("one", "two"), prompt["answers"][1:], strict=True):
            text, reward, tokens = plain(made, name, question)
            assert said["text"] == text
            assert said["rewards"][name]["reward"] == pytest.approx(reward, abs=1e-4)
            assert [each["rewards"][name] for each in said["token_rewards"]] == pytest.approx(tokens, abs=1e-4)
            assert said["rewards"][name]["per_token"] == pytest.approx(reward / len(tokens), abs=1e-4)
    assert {said["text"] for prompt in found["prompts"] for said in prompt["answers"]} > {
        found["prompts"][0]["answers"][0]["text"]
    }


def test_an_adapter_beside_another_says_what_it_says_alone(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both, alone = (compared(capsys, made, *names) for names in (("one", "two"), ("two",)))
    for together, single in zip(both["prompts"], alone["prompts"], strict=True):
        base, _, second = together["answers"]
        assert [base["text"], second["text"]] == [said["text"] for said in single["answers"]]
        assert second["rewards"]["two"]["reward"] == pytest.approx(single["answers"][1]["rewards"]["two"]["reward"])


def test_columns_stand_side_by_side_with_a_reward_below(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "compare",
        str(made / "one"),
        "-p",
        "Is it far?",
        "--max-new-tokens",
        "4",
        "--dtype",
        "fp32",
        "--tokens",
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].strip() == "Is it far?"
    assert re.search(r"base, \d tokens +one, \d tokens", shown)
    assert re.search(r"reward [+-]\d\.\d{3}, [+-]\d\.\d{4} a token +reward [+-]", shown)


def test_prompts_come_from_files_and_from_the_run_itself(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, words = tmp_path / "p.jsonl", tmp_path / "p.txt"
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Is it late?"}]
    lines.write_text(json.dumps({"prompt": "Is it far?"}) + "\n" + json.dumps({"prompt": turns}) + "\n")
    words.write_text("Is it far?\n\nIs it late?\n")
    others = [tmp_path / name for name in ("p.json", "p.csv")]
    others[0].write_text(json.dumps([{"prompt": "Is it far?"}, {"prompt": turns}], indent=1))
    others[1].write_text("id,prompt\n1,Is it far?\n2,Is it late?\n")
    (made / "one" / "samples.jsonl").write_text(lines.read_text())
    short = ("--max-new-tokens", "2", "--json")
    found = []
    files = [["--prompts", str(file)] for file in (lines, words, *others)]
    for given in (*files, [], ["-s", "Be brief."]):
        assert main(["compare", str(made / "one"), *given, *short]) == 0
        found.append([each["prompt"] for each in json.loads(capsys.readouterr().out)["prompts"]])
    far, late = [[{"role": "user", "content": each}] for each in ("Is it far?", "Is it late?")]
    brief = {"role": "system", "content": "Be brief."}
    from_files = [[far, turns], [far, late], [far, turns], [far, late]]
    assert found == [*from_files, [far, turns], [[brief, *far], [brief, *late]]]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_line_separator_inside_a_prompt_ends_no_prompt(tmp_path: Path, name: str) -> None:
    asked = ["Is\u2028it\x85far?", "Is it\u2029late?"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) if name.endswith("l") else text for text in asked]
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    assert [turn["content"] for (turn,) in _read_prompts(tmp_path / name)] == asked


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "nothing: there is no such folder; name folders of runs, as in adapters/hh"),
        (["base"], "base: is no adapter; name folders of runs, as in adapters/hh"),
        (["two"], "two: keeps no held-out prompts; give some with -p TEXT or --prompts FILE"),
        (["two", "-p", " "], "-p: the prompt is empty; write a question"),
        (["two", "two", "-p", "Hi"], "two: an adapter is named twice; name each once"),
        (["two", "--prompts", "no.txt"], "no.txt: cannot be read: No such file or directory; name a file of prompts"),
        (
            ["two", "--prompts", "bad.jsonl"],
            'bad.jsonl:2: is no prompt; write {"prompt": "TEXT"}, or a list of messages',
        ),
        (["two", "--prompts", "turns.jsonl"], "turns.jsonl:1: is no prompt: no user turn before the answer"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    made: Path,
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(made)
    Path("bad.jsonl").write_text('{"prompt": "Hi"}\n{"question": "Hi"}\n')
    Path("turns.jsonl").write_text('{"prompt": []}\n')
    assert main(["compare", *arguments]) == 2
    assert capsys.readouterr() == ("", f"qlora-dpo: {sentence}\n")


def test_adapters_of_two_bases_are_not_compared(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(made / "one"), str(made / "other"), "-p", "Hi"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"qlora-dpo: {made / 'other'}: is an adapter of {made / 'base2'} (none), and {made / 'one'} one of "
        f"{made / 'base'} (none); compare adapters of one base"
    )


HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7 * 7 }} \x1b[31m"


def test_the_page_holds_hostile_text_as_text_and_asks_nobody() -> None:
    reward = {HOSTILE: {"reward": 1.5, "per_token": 0.5}}
    said = {
        "voice": HOSTILE,
        "text": HOSTILE,
        "tokens": 3,
        "ended": False,
        "rewards": reward,
        "token_rewards": [{"token": HOSTILE, "rewards": {HOSTILE: 0.5}}],
    }
    record = {
        "base": HOSTILE,
        "adapters": [{"name": HOSTILE, "beta": 0.1}],
        "max_new_tokens": 12,
        "computed_in": "fp32 on CPU",
        "prompts": [{"prompt": [{"role": "user", "content": HOSTILE}], "answers": [said]}],
    }
    page = Tags()
    page.feed(comparison_page(record))
    assert {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe"} == set()
    assert [name for _, each in page.tags for name in each if name in ("src", "href") or name.startswith("on")] == []
    assert page.text.count(HOSTILE.removesuffix("\x1b[31m")) >= 5
    assert "\x1b" not in page.text


def test_the_page_is_written(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared(capsys, made, "one", f"--html={tmp_path / 'c.html'}")
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert ASKED[0] in page
