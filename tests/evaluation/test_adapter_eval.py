"""`eval` says of an adapter what transformers and PEFT alone say, and its gate has an exit code."""

import gzip
import json
import math
import re
import shutil
import subprocess
import sys
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_adapters
import tiny_run
import torch
from peft import PeftModel
from rich.console import Console
from tiny_run import LIBRARIES_WARN
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_dpo.cli import main
from qlora_dpo.evaluation.adapter_eval import EvalPairs, score_adapter
from qlora_dpo.evaluation.calibration import calibration
from qlora_dpo.evaluation.eval_metrics import compute_eval_metrics
from qlora_dpo.evaluation.length_bias import (
    accuracy_by_length,
    accuracy_by_length_difference,
    length_controlled_accuracy,
)
from qlora_dpo.preference.objective import LossColumns
from qlora_dpo.preference.reference import compute_reference_logps
from qlora_dpo.preference.reference_cache import ReferenceLogpCache
from qlora_dpo.preference.token_weights import make_token_weighting
from qlora_dpo.report.eval_tables import eval_metric_tables
from qlora_dpo.training.context import PreferenceDataset
from qlora_dpo.training.evaluate import evaluate

pytestmark = LIBRARIES_WARN

SHARED = Path(__file__).parents[3] / "shared"
TEXT = "The cat sat on the mat. " * 40
BETA = 0.1


@pytest.fixture(scope="module", params=["none", "nf4"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter `a` of it, 12 held-out pairs and a plain text."""
    home = tmp_path_factory.mktemp("eval")
    saved_adapters.save_adapter(home / "a", saved_adapters.save_base(home / "base"), request.param, size=0.4)
    rows = [json.loads(line) for line in (home / "heldout.jsonl").read_text().splitlines()]
    for row in rows[::3]:  # else the adapter would be right or wrong about all of these
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    (home / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "text.txt").write_text(TEXT)
    return home


def judged(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["eval", *arguments, "--dtype", "fp32", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def turns(prompt: str) -> list[dict[str, str]]:
    """A question, or a dialogue in HH's marking, as messages."""
    if "\n\nHuman: " not in prompt:
        return [{"role": "user", "content": prompt}]
    parts = re.split(r"\n\n(Human|Assistant):", prompt)[1:]
    names = {"Human": "user", "Assistant": "assistant"}
    said = [
        {"role": names[who], "content": text.removeprefix(" ")}
        for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    return said[:-1]  # the last mark is where the answer begins


def plain(base: Path, adapter: Path, pairs: Path, text: str, quantization: str) -> dict[str, float]:
    """The figures by transformers and PEFT, one answer at a time; nothing of this project is asked."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, **({"quantization_config": nf4} if quantization == "nf4" else {})
    )
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # with it, bitsandbytes computes in bf16 whatever is asked
            module.support_avx512bf16_for_cpu = False
    model: Any = PeftModel.from_pretrained(loaded, adapter).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(adapter)

    @torch.no_grad()
    def both(prompt: list[int], answer: list[int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the whole vocabulary at each answer token: tuned and base."""
        ids, rows = torch.tensor([prompt + answer]), slice(len(prompt) - 1, -1)
        tuned = model(input_ids=ids).logits[0, rows].double().log_softmax(-1)
        with model.disable_adapter():
            return tuned, model(input_ids=ids).logits[0, rows].double().log_softmax(-1)

    def at(logps: Tensor, answer: list[int]) -> float:
        return float(logps[range(len(answer)), answer].sum())

    margins, kl, tokens, chosen = [], 0.0, 0, {"tuned": 0.0, "base": 0.0}
    for row in map(json.loads, pairs.read_text().splitlines()):
        asked = turns(row["prompt"])
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        ratios = []
        for side in ("chosen", "rejected"):
            chat = [*asked, {"role": "assistant", "content": row[side].removeprefix(" ")}]
            whole = tokenizer.apply_chat_template(chat, return_dict=False)
            end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
            answer = whole[len(prompt) : end]
            tuned, base_ = both(prompt, answer)
            ratios.append(at(tuned, answer) - at(base_, answer))
            if side == "chosen":
                kl += float((tuned.exp() * (tuned - base_)).sum())
                tokens += len(answer)
                chosen["tuned"] += at(tuned, answer)
                chosen["base"] += at(base_, answer)
        margins.append(BETA * (ratios[0] - ratios[1]))
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    read, read_base = both(words[:1], words[1:])
    p = 1 / (1 + np.exp(-np.array(margins)))
    confidence, right = np.maximum(p, 1 - p), (p > 0.5).astype(float)
    ece = 0.0
    for low in np.arange(10) / 20 + 0.5:
        mine = (confidence > low) & (confidence <= low + 0.05 + 1e-12)
        if mine.any():
            ece += mine.sum() / len(p) * abs(right[mine].mean() - confidence[mine].mean())
    return {
        "accuracy": float(right.mean()),
        "margin": float(np.mean(margins)),
        "loss": float(np.mean(-np.log(p))),
        "kl": kl / tokens,
        "tuned": math.exp(-chosen["tuned"] / tokens),
        "base": math.exp(-chosen["base"] / tokens),
        "text tuned": math.exp(-at(read, words[1:]) / (len(words) - 1)),
        "text base": math.exp(-at(read_base, words[1:]) / (len(words) - 1)),
        "ece": float(ece),
    }


def same_figures(found: dict[str, Any], text: str) -> dict[str, float]:
    """What `eval --json` says, under the names of `plain`."""
    return {
        **{name: found[name] for name in ("accuracy", "margin", "loss", "kl")},
        **{name: found["perplexity"][name] for name in ("tuned", "base")},
        **{f"text {name}": found["texts"][text][name] for name in ("tuned", "base")},
        "ece": found["calibration"]["ece"],
    }


def test_eval_says_what_transformers_and_peft_alone_say(
    made: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(made / "text.txt")
    found = judged(capsys, str(made / "a"), "--text", text)
    quantization = "nf4" if "nf4" in (made / "a" / "resolved.toml").read_text() else "none"
    expected = plain(made / "base", made / "a", made / "heldout.jsonl", TEXT, quantization)
    assert same_figures(found, text) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert (found["pairs"], found["data"]["used"]) == (12, 12)
    assert abs(found["margin"]) > 0.05
    assert found["kl"] > 0.05  # the adapter does something


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(not SHARED.is_dir(), reason="the tool that fetches real weights is not beside this checkout")
def test_eval_says_so_of_real_weights_and_real_pairs(
    tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, pairs, text = tmp_path / "base", tmp_path / "pairs.jsonl", tmp_path / "text.txt"
    subprocess.run([sys.executable, str(SHARED / "tools" / "get_models.py"), "smollm2", str(base)], check=True)
    saved_adapters.save_adapter(tmp_path / "a", base, "nf4")
    text.write_text(TEXT)
    for rows in (house_rules(), hh(24)):
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = judged(capsys, str(tmp_path / "a"), "--data", str(pairs), "--text", str(text))
        assert found["pairs"] == len(rows)
        expected = plain(base, tmp_path / "a", pairs, TEXT, "nf4")
        assert same_figures(found, str(text)) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def house_rules() -> list[dict[str, str]]:
    """The quickstart's held-out pairs, as texts."""
    file = Path(__file__).parents[2] / "recipes" / "house_rules" / "heldout.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{name: row[name][-1]["content"] for name in ("prompt", "chosen", "rejected")} for row in rows]


def hh(count: int) -> list[dict[str, str]]:
    """The first HH rows that fit in 400 tokens, which are about 1,500 characters."""
    with gzip.open(SHARED / "data" / "hh" / "full-hh-style.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        short = (row for row in rows if len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])) < 1500)
        return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in islice(short, count)]


def test_the_gate_ends_with_3_and_the_figures_are_there_all_the_same(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy = judged(capsys, str(made / "a"))["accuracy"]
    bar = accuracy + 0.01
    assert main(["eval", str(made / "a"), "--dtype", "fp32", "--json", "--min-accuracy", str(bar)]) == 3
    told = capsys.readouterr()
    assert json.loads(told.out)["accuracy"] == accuracy
    sentence = f"{made / 'a'}: the accuracy {accuracy:.4f} of 12 pairs is below --min-accuracy {bar:g}"
    assert told.err.splitlines()[-1] == f"qlora-dpo: {sentence}"
    assert main(["eval", str(made / "a"), "--dtype", "fp32", "--min-accuracy", str(accuracy)]) == 0
    shown = capsys.readouterr().out
    assert [line.split() for line in shown.splitlines() if line.startswith(" accuracy")] == [
        ["accuracy", f"{accuracy:.3f}"]
    ]


def test_training_pairs_are_named_as_such(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(made / "a"), "--data", str(made / "train.jsonl"), "--dtype", "fp32"]) == 0
    assert (
        "the adapter was trained on pairs of this source: the figures say little about others"
        in capsys.readouterr().err
    )


def test_an_adapter_from_elsewhere_is_judged_with_dpo_on_pairs_that_are_named(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "nf4" in (made / "a" / "resolved.toml").read_text():
        pytest.skip("an adapter without a recipe is taken to be of a dense base")
    own = judged(capsys, str(made / "a"))
    foreign = shutil.copytree(made / "a", tmp_path / "foreign")
    for name in ("resolved.toml", "run.json"):
        (foreign / name).unlink()
    found = judged(capsys, str(foreign), "--data", str(made / "heldout.jsonl"))
    assert (found["accuracy"], found["loss"]) == (own["accuracy"], pytest.approx(own["loss"], rel=1e-5))
    assert main(["eval", str(foreign)]) == 2
    assert capsys.readouterr().err == (
        f"qlora-dpo: {foreign}: comes without a recipe, so its held-out pairs are not known; add --data\n"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["nothing"],
            "nothing: there is no such folder; eval compares an adapter with its base, so name the folder of a run, as "
            "in adapters/hh",
        ),
        (
            ["base"],
            "base: is no adapter; eval compares an adapter with its base, so name the folder of a run, as in "
            "adapters/hh",
        ),
        (["a", "--data", "h.jsonl", "--split", "x"], "--split x: h.jsonl is one file and has no splits; leave it out"),
        (["a", "--text", "no.txt"], "no.txt: cannot be read: No such file or directory; --text takes plain text"),
        (["a", "--text", "empty.txt"], "empty.txt: is empty; --text takes plain text"),
        (["a", "--text", "latin.txt"], "latin.txt: is not UTF-8 text (byte 0); --text takes plain text"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    own: Path, arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(own.parent)
    Path("empty.txt").write_text(" \n")
    Path("latin.txt").write_bytes(b"\xe9t\xe9")
    assert main(["eval", *arguments]) == 2
    assert capsys.readouterr() == ("", f"qlora-dpo: {sentence}\n")


def test_what_is_too_long_is_counted_and_max_length_decides(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = judged(capsys, str(made / "a"), "--max-pairs", "5")
    assert found["data"] == {"source": f"{made / 'heldout.jsonl'}", "rows": 12, "used": 5, "dropped": {}}
    lines = (made / "heldout.jsonl").read_text().splitlines()
    longer = lines[0].replace("find", "find " * 300)
    (made / "long.jsonl").write_text("\n".join([*lines, longer]))
    some = judged(capsys, str(made / "a"), "--data", str(made / "long.jsonl"), "--max-length", "150")
    every = judged(capsys, str(made / "a"), "--data", str(made / "long.jsonl"), "--max-length", "900")
    assert every["data"]["dropped"] == {}
    assert (some["data"]["used"], some["data"]["dropped"]) == (12, {"longer than max_length": 1})
    assert every["data"]["used"] == 13


@pytest.mark.parametrize(
    "objective",
    [
        {"sft_weight": 0.5},
        {"loss_type": "ipo"},
        {"loss_type": "simpo"},
        {"loss_type": "sampo"},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"loss_type": "kto"},
    ],
)
def test_eval_says_what_trainings_own_evaluation_says(objective: dict[str, Any], tmp_path: Path) -> None:
    what = tiny_run.recipe(objective=objective)
    model, pairs = tiny_run.stirred(tiny_run.fresh(what)), tiny_run.pairs(9)
    weighed = make_token_weighting(what.objective)
    packing = tiny_run.PACKED.__class__(128, tiny_run.PAD, "spans", weighed)
    reference_P2 = compute_reference_logps(
        model, pairs, ReferenceLogpCache(tmp_path / "training"), packing, tiny_run.CPU
    )
    kto = objective.get("loss_type") == "kto"
    columns = LossColumns(label_P=torch.tensor([True, False, True] * 3)) if kto else LossColumns()
    record = evaluate(model, PreferenceDataset(pairs, reference_P2, columns), what.objective, packing, tiny_run.CPU)
    plain_packing = tiny_run.PACKED.__class__(128, tiny_run.PAD, "spans")
    asked: list[int] = []
    found = score_adapter(
        model,
        EvalPairs(pairs, columns, what.objective),
        plain_packing,
        lambda each: ReferenceLogpCache(tmp_path / (each.name if each else "plain")),
        tiny_run.CPU,
        asked.append,
    )
    for name, value in {
        "loss": found.loss_P.mean(),
        "preference_loss": found.preference_P.mean(),
        "rewards/chosen": found.rewards_P2[:, 0].mean(),
        "rewards/rejected": found.rewards_P2[:, 1].mean(),
        "rewards/accuracies": found.correct_P.mean(),
    }.items():
        assert record[f"eval_{name}"] == pytest.approx(float(value), rel=1e-5), name
    assert sum(asked) == 3 * len(pairs)
    figures = compute_eval_metrics(found, pairs, what.objective, {})
    assert (figures["length"] is None) == kto
    shown = StringIO()
    Console(file=shown, width=100).print(eval_metric_tables(figures))
    assert ("at equal lengths" in shown.getvalue()) != kto
    whole_P2 = compute_reference_logps(
        model, pairs, ReferenceLogpCache(tmp_path / "whole"), plain_packing, tiny_run.CPU
    )
    torch.testing.assert_close(found.base_logp_P2.float(), whole_P2)


def test_confidence_that_is_met_is_calibrated_and_a_coin_that_is_sure_is_not() -> None:
    margin_P = torch.tensor([math.log(3.0) - 1e-9] * 4, dtype=torch.float64)  # sigmoid is 3/4
    met = calibration(margin_P, torch.tensor([1.0, 1, 1, 0]))
    assert (met.ece, met.brier) == (pytest.approx(0, abs=1e-6), pytest.approx(1 / 16))
    (only,) = met.bins
    assert (only.low, only.high, only.pairs) == (pytest.approx(0.7), pytest.approx(0.75), 4)
    sure = calibration(torch.tensor([50.0, -50.0]), torch.tensor([1.0, 0.0]))
    assert (sure.ece, sure.brier) == (pytest.approx(0.5), pytest.approx(0.5))
    tied = calibration(torch.zeros(3), torch.full((3,), 0.5))
    assert (tied.ece, tied.brier) == (0, 0.25)


def test_what_picks_by_length_alone_is_a_coin_at_equal_lengths() -> None:
    tokens_P2 = torch.tensor([(10 + d, 10) for d in (-6, -3, -1, 1, 3, 6)])
    right_P = (tokens_P2[:, 0] > tokens_P2[:, 1]).double()
    longer = length_controlled_accuracy(tokens_P2, right_P)
    assert longer.accuracy == pytest.approx(0.5, abs=1e-9)
    assert longer.length_coefficient > 0
    groups = accuracy_by_length_difference(tokens_P2, right_P)
    assert {name: each.num_correct / each.pairs for name, each in groups.items()} == {"shorter": 0, "longer": 1}


def test_the_controlled_accuracy_is_the_regularized_maximum_likelihood() -> None:
    """At the maximum the likelihood's slope in theta is 0, and in phi it is phi."""
    generator = torch.Generator().manual_seed(0)
    tokens_P2 = torch.randint(1, 60, (50, 2), generator=generator)
    right_P = torch.randint(0, 3, (50,), generator=generator).double() / 2
    found = length_controlled_accuracy(tokens_P2, right_P)
    d_P = (tokens_P2[:, 0] - tokens_P2[:, 1]).double()
    x_P = torch.tanh(d_P / d_P.std(correction=0))
    theta = math.log(found.accuracy / (1 - found.accuracy))
    short_P = right_P - torch.sigmoid(theta + found.length_coefficient * x_P)
    assert float(short_P.sum()) == pytest.approx(0, abs=1e-8)
    assert float((short_P * x_P).sum()) == pytest.approx(found.length_coefficient, abs=1e-8)
    assert length_controlled_accuracy(tokens_P2, torch.ones(50)).accuracy == 1
    assert length_controlled_accuracy(torch.ones(50, 2), right_P).accuracy == float(right_P.mean())


def test_every_pair_is_in_one_bin_of_length() -> None:
    tokens_P2 = torch.tensor([(n, n + 2) for n in range(1, 13)])
    bins = accuracy_by_length(tokens_P2, torch.ones(12))
    assert [(each.low, each.high, each.pairs) for each in bins] == [(2, 4, 3), (5, 7, 3), (8, 10, 3), (11, 13, 3)]
