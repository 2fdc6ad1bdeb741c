"""`merge --onto auto` measures both bases and keeps one by a printed rule; its gates; what it needs."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from saved_adapters import save_both

from qlora_dpo.adapter import OpenedModel
from qlora_dpo.cli import main
from qlora_dpo.deploy import merge as merging
from qlora_dpo.deploy import merge_memory
from qlora_dpo.deploy.base_choice import RULE, MergeThresholds, choose_base
from qlora_dpo.errors import DoesNotFitError, GateError, SourceError


def figures(kl: float = 0.0, top1: float = 1.0, why: str = "", **measured: float) -> dict[str, Any]:
    merged = {"accuracy": 0.8, "loss": 0.5, "perplexity": 10.0} | measured
    return {"kl": kl, "top1": top1, "why_no_accuracy": why, **{f"merged_{name}": each for name, each in merged.items()}}


@pytest.mark.parametrize(
    ("original", "chosen"),
    [
        ({"loss": 0.4, "perplexity": 9.0}, "original"),
        ({"loss": 0.4, "perplexity": 9.0, "accuracy": 0.9}, "original"),
        ({"loss": 0.4, "perplexity": 9.0, "accuracy": 0.79}, "trained"),
        ({"loss": 0.4}, "trained"),
        ({"perplexity": 9.0}, "trained"),
        ({}, "trained"),
    ],
)
def test_the_original_is_kept_only_if_it_wins_in_every_figure(original: dict[str, float], chosen: str) -> None:
    assert choose_base({"trained": figures(), "original": figures(0.2, 0.8, **original)}, MergeThresholds()) == chosen


def test_without_held_out_pairs_the_trained_base_is_kept() -> None:
    better = {"loss": 0.1, "perplexity": 1.0}
    assert (
        choose_base(
            {"trained": figures(why="no data"), "original": figures(why="no data", **better)}, MergeThresholds()
        )
        == "trained"
    )


def test_a_base_that_misses_a_bar_is_not_kept_however_good_it_is() -> None:
    better = figures(0.2, 0.8, loss=0.1, perplexity=1.0)
    assert (
        choose_base({"trained": figures(), "original": better}, MergeThresholds(max_kl=0.2, min_agreement=0.8))
        == "original"
    )
    assert choose_base({"trained": figures(), "original": better}, MergeThresholds(max_kl=0.1)) == "trained"
    with pytest.raises(GateError) as raised:
        choose_base({"trained": figures(0.01, 0.5), "original": better}, MergeThresholds(max_kl=0.1, min_agreement=0.9))
    assert str(raised.value) == (
        "onto trained: top-1 agreement 0.5000 is below --min-agreement 0.9; "
        "onto original: KL 0.2 nats per token is above --max-kl 0.1; nothing was kept"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_both(tmp_path_factory.mktemp("made"))


def test_auto_prints_all_rows_and_the_merged_folder_carries_them(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(place / "nf4"), "-o", str(tmp_path / "m"), "--onto", "auto"]) == 0
    record = json.loads((tmp_path / "m" / "merge.json").read_text())
    trained, original = (record["candidates"][onto] for onto in ("trained", "original"))
    assert trained["kl"] < 0.001 < original["kl"]
    assert trained["trained_loss"] == original["trained_loss"], "both are compared with one model"
    assert record["kl"] == record["candidates"][record["onto"]]["kl"]
    assert record["rule"] == RULE
    assert not [each for each in (tmp_path / "m").iterdir() if each.is_dir()], "the other candidate is gone"
    told = capsys.readouterr().out
    assert f"The rule: {RULE}." in told
    for onto, each in (("trained", trained), ("original", original)):
        row = f"  merged onto {onto}"
        line = next(line for line in told.splitlines() if line.startswith(row))
        wanted = [f"{each['kl']:.2g}", f"{each['top1']:.4f}", f"{each['merged_accuracy']:.3f}"]
        wanted += [f"{each['merged_loss']:.4f}", f"{each['merged_perplexity']:.3f}"]
        assert line.removeprefix(row).split() == wanted
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"So: onto {record['onto']}." in card
    assert f"| merged onto original | {original['kl']:.2g} |" in card
    assert main(["verify", str(tmp_path / "m")]) == 0


def test_auto_keeps_the_files_of_the_base_it_names(place: Path, tmp_path: Path) -> None:
    for onto in ("trained", "original"):
        other = "original" if onto == "trained" else "trained"
        said = {onto: figures(1e-6, 0.9, loss=0.1, perplexity=1.0), other: figures(1e-6, 0.9)}
        kept = merging.merge_adapter(
            merging.open_for_merge(place / "nf4"),
            tmp_path / f"auto-{onto}",
            "auto",
            "fp32",
            lambda folder, said=said: {
                **said[folder.name],
                "tokens": 1,
                "measured_on": "",
                "computed_in": "",
                "beta": 0.1,
                **{f"trained_{name}": 1.0 for name in ("accuracy", "loss", "perplexity")},
            },
        )
        assert kept.onto == onto
        alone = {"kl": 0.0, "top1": 1.0, "why_no_accuracy": "-", "tokens": 1, "measured_on": "", "computed_in": ""}
        opened = merging.open_for_merge(place / "nf4")
        merging.merge_adapter(opened, tmp_path / onto, onto, "fp32", lambda _, alone=alone: alone)
        files = [(tmp_path / name / "model.safetensors").read_bytes() for name in (f"auto-{onto}", onto)]
        assert files[0] == files[1]


def test_without_quantization_there_is_one_base_to_measure(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(place / "none"), "-o", str(tmp_path / "m"), "--onto", "auto"]) == 0
    assert "candidates" not in json.loads((tmp_path / "m" / "merge.json").read_text())
    assert "The rule" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "bar", "sentence"),
    [
        ("--max-kl", "1e-3", "KL {kl:.3g} nats per token is above --max-kl 0.001"),
        ("--min-agreement", "0.999", "top-1 agreement {top1:.4f} is below --min-agreement 0.999"),
    ],
)
def test_a_missed_bar_ends_with_3_and_leaves_nothing(
    option: str, bar: str, sentence: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["merge", str(place / "nf4"), "--onto", "original", "-o"]
    assert main([*command, str(tmp_path / "free")]) == 0
    found = json.loads((tmp_path / "free" / "merge.json").read_text())
    capsys.readouterr()
    assert main([*command, str(tmp_path / "m"), option, bar]) == 3
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"qlora-dpo: {sentence.format(**found)}; nothing was kept"
    assert [each.name for each in tmp_path.iterdir()] == ["free"]


# --- what it needs is known before it starts


def opened_nf4(place: Path) -> OpenedModel:
    return merging.open_for_merge(place / "nf4")


def test_the_disk_that_is_stated_is_what_is_written(place: Path, tmp_path: Path) -> None:
    import torch

    opened = opened_nf4(place)
    base = load_file(place / "base" / "model.safetensors")
    for dtype, bytes_each in ((torch.bfloat16, 2), (torch.float32, 4)):
        needed = merge_memory.estimate_merge_memory(opened, dtype, candidates=2)
        elements = sum(each.numel() for each in base.values())
        assert needed.disk_bytes == 2 * bytes_each * elements
        assert needed.shard_bytes == bytes_each * elements  # one shard holds it all
        assert needed.layer_bytes == 4 * 128 * 64  # up_proj, in float32
        # a CPU compares in float32; the file is mapped meanwhile
        assert needed.check_bytes == (4 + bytes_each) * elements


def test_a_base_that_is_loaded_whole_is_planned_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from qlora_dpo.deploy import shards

    opened = opened_nf4(place)
    elements = sum(each.numel() for each in load_file(place / "base" / "model.safetensors").values())
    adapter = sum(each.numel() for name, each in opened.model.named_parameters() if "lora_" in name)
    monkeypatch.setattr(shards, "list_tensors", lambda folder: {})
    needed = merge_memory.estimate_merge_memory(opened, torch.bfloat16, candidates=1)
    written = 2 * (elements + adapter)
    assert (needed.shard_bytes, needed.layer_bytes, needed.disk_bytes) == (written, 0, written)


def test_a_disk_or_a_memory_that_is_too_small_is_refused_first(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = opened_nf4(place)
    with pytest.raises(SourceError, match=r"needs 1,000,000,000,000\.0 MB and the disk has"):
        merge_memory.check_merge_memory(merge_memory.MergeMemory(0, 0, 0, 0, 10**18), opened, tmp_path / "m")
    with pytest.raises(DoesNotFitError, match=r"^merging takes 1,000,000,000\.54 GB more memory and .* are free; "):
        merge_memory.check_merge_memory(merge_memory.MergeMemory(0, 0, 0, 10**18, 0), opened, tmp_path / "m")
