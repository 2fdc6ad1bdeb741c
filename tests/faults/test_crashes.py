"""A save that is killed, torn or out of space at any file event leaves the old state or the new one, never another."""

import copy
import functools
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import tiny_run
import torch
from file_faults import Fault, points, struck
from peft import PeftModel
from transformers import set_seed

from qlora_dpo.adapter import save_adapter
from qlora_dpo.errors import QloraDpoError, RunError
from qlora_dpo.files import atomic_folder
from qlora_dpo.manifest import MANIFEST, find_damage
from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME
from qlora_dpo.training.checkpoint.integrity import checkpoint_damage
from qlora_dpo.training.checkpoint.save import newest_valid, save_checkpoint
from qlora_dpo.training.checkpoint.state import TrainState

pytestmark = [
    tiny_run.LIBRARIES_WARN,
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc"),
]

FAULTS = pytest.mark.parametrize("fault", ["killed", "torn", "full"])
EVERY = pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
START = TrainState(0, {}, {"base": "base", "pairs": "pairs"})


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as it is after 0, 1, 2 and 3 saves: folders 0 to 3."""
    home = tmp_path_factory.mktemp("history")
    (home / "0").mkdir()
    for step in (1, 2, 3):
        shutil.copytree(home / str(step - 1), home / str(step))
        save(home / str(step), step)
    return home


@functools.cache
def trained(step: int) -> tuple[PeftModel, torch.optim.Optimizer]:
    """A model and an optimizer whose tensors no other step has."""
    model = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe()), seed=step)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values())
    torch.manual_seed(step)
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def save(run_dir: Path, step: int) -> None:
    """Save the checkpoint of `step`."""
    model, optimizer = trained(step)
    set_seed(step)
    save_checkpoint(run_dir, replace(copy.deepcopy(START), step=step), model, optimizer.state)


def strikes(act_on: Path, before: Path, fault: Fault, step: int, every: int) -> Iterator[int]:
    """Strike at one file event of the save of `step` after another, `every` so many, each time from `before`."""
    trained(step)  # before the children need it
    for point in points(every):
        shutil.rmtree(act_on, ignore_errors=True)
        shutil.copytree(before, act_on)
        if not struck(lambda: save(act_on, step), point, fault, act_on):
            assert point > 20, "a save has more file events than that"
            print(f"{fault}: every {every} of {point - 1} points of save {step}")
            return
        yield point


@EVERY
@FAULTS
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_checkpoint_is_the_old_one_or_the_new_one(
    step: int, fault: Fault, every: int, history: Path, tmp_path: Path
) -> None:
    files = ("adapter.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")
    for point in strikes(tmp_path / "run", history / str(step - 1), fault, step, every):
        try:
            newest, skipped = newest_valid(tmp_path / "run")
        except RunError:
            assert step == 1, point
            continue
        number = int(newest.name.removeprefix("step-"))
        assert (number in (step - 1, step), skipped) == (True, []), point
        for name in files:
            whole = history / str(number) / "checkpoints" / newest.name / name
            assert (newest / name).read_bytes() == whole.read_bytes(), (point, name)
        if point % 7 < every:  # what a killed save leaves stands in no later one's way
            save(tmp_path / "run", step + 1)
            assert newest_valid(tmp_path / "run")[0].name == f"step-{step + 1:06d}"
            assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("states", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_whatever_unflushed_writes_are_lost_the_state_is_the_old_one_or_the_new_one(
    states: int, history: Path, tmp_path: Path
) -> None:
    draw, found = random.Random(0), {2: 0, 3: 0}
    trained(3)
    run = tmp_path / "run"
    for seed in range(states):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(history / "2", run)
        struck(lambda: save(run, 3), draw.randint(1, 40), "torn", run, seed)
        newest, skipped = newest_valid(run)
        number = int(newest.name.removeprefix("step-"))
        whole = history / str(number) / "checkpoints" / newest.name
        assert skipped == [], seed
        assert all((newest / file.name).read_bytes() == file.read_bytes() for file in whole.iterdir()), seed
        found[number] += 1
    print(f"{states} states: {found[2]} old, {found[3]} new")
    assert min(found.values()) > 0


@EVERY
@FAULTS
def test_an_adapter_folder_never_holds_a_mixture_of_two(fault: Fault, every: int, tmp_path: Path) -> None:
    """The adapter of a first training is overwritten by that of a resumed one."""
    models = [trained(1)[0], trained(2)[0]]
    folders = [tmp_path / "old", tmp_path / "new"]
    for folder, model in zip(folders, models, strict=True):
        folder.mkdir()
        save_adapter(folder, model, tiny_run.tiny.tokenizer(), tiny_run.source())
    known = [(folder / ADAPTER_SAFE_WEIGHTS_NAME).read_bytes() for folder in folders]
    run, usable = tmp_path / "run", 0
    for point in points(every):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(folders[0], run)
        if not struck(
            lambda: save_adapter(run, models[1], tiny_run.tiny.tokenizer(), tiny_run.source()), point, fault, run
        ):
            break
        if not (run / ADAPTER_CONFIG_NAME).is_file():
            continue  # it counts as no adapter
        found = known.index((run / ADAPTER_SAFE_WEIGHTS_NAME).read_bytes())
        if (run / MANIFEST).is_file():
            assert find_damage(run, required=ADAPTER_SAFE_WEIGHTS_NAME) == "", point
        else:
            assert found == 1, point  # all files are new ones; only their list is missing
        usable += 1
    assert usable > 3 / every
    assert point > 20


@FAULTS
def test_a_whole_folder_is_there_with_all_its_files_or_not_at_all(fault: Fault, tmp_path: Path) -> None:
    def fill() -> None:
        with atomic_folder(tmp_path / "merged") as temporary:
            for name in ("a", "b"):
                (temporary / name).write_bytes(bytes(1000))

    for point in count(1):
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        if not struck(fill, point, fault, tmp_path):
            break
        if (tmp_path / "merged").exists():
            assert [(tmp_path / "merged" / name).stat().st_size for name in ("a", "b")] == [1000, 1000], point
    assert point > 8


def test_every_one_of_1000_bit_flips_is_found(history: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step"
    shutil.copytree(history / "3" / "checkpoints" / "step-000003", folder)
    sizes = {file: file.stat().st_size for file in sorted(folder.iterdir())}
    generator = torch.Generator().manual_seed(0)
    files = list(sizes)
    for _ in range(1000):
        file = files[int(torch.randint(len(files), (), generator=generator))]
        where = int(torch.randint(8 * sizes[file], (), generator=generator))
        whole = file.read_bytes()
        broken = bytearray(whole)
        broken[where // 8] ^= 1 << where % 8
        file.write_bytes(broken)
        assert checkpoint_damage(folder), (file.name, where)
        file.write_bytes(whole)
    assert checkpoint_damage(folder) == ""


def test_a_truncated_missing_or_swapped_file_is_named(history: Path, tmp_path: Path) -> None:
    source = history / "3" / "checkpoints" / "step-000003"
    names = sorted(file.name for file in source.iterdir())
    for name in names:
        whole = (source / name).read_bytes()
        other = (history / "2" / "checkpoints" / "step-000002" / name).read_bytes()
        cut = {length: whole[:length] for length in _lengths(len(whole))}
        for what, content in {**cut, "swapped": other, "gone": None}.items():
            folder = tmp_path / "step"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            if content is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(content)
            found = checkpoint_damage(folder)
            # another step's manifest is whole in itself: then what it lists does not fit
            assert name in found or (name == "manifest.json" and found), (name, what)


def _lengths(whole: int) -> list[int]:
    return [0, 1, whole // 4, whole // 2, whole // 2 + 1, whole - 3, whole - 2]  # without its last \n, JSON is whole


def test_nothing_that_is_not_finite_is_saved(tmp_path: Path) -> None:
    model = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe()))
    optimizer = torch.optim.AdamW(trainable_parameters(model).values())
    name, parameter = next(iter(trainable_parameters(model).items()))
    parameter.data[0, 0] = float("inf")
    with pytest.raises(RunError) as error:
        save_checkpoint(tmp_path, copy.deepcopy(START), model, optimizer.state)
    folder = tmp_path / "checkpoints" / "step-000000"
    assert str(error.value) == f"{folder}: not written, since {name} is not finite; lower train.learning_rate"
    with pytest.raises(RunError, match=r"no adapter was written, since .* is not finite; lower train\.learning_rate"):
        save_adapter(tmp_path, model, tiny_run.tiny.tokenizer(), tiny_run.source())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(QloraDpoError, match=r"needs 1\.\d MB and the disk has 0.0 MB free; free some space$"):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_names_files_elsewhere_is_damaged(history: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step"
    shutil.copytree(history / "3" / "checkpoints" / "step-000003", folder)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"state.json"', '"../state.json"'))
    assert checkpoint_damage(folder) == "manifest.json names a file outside of the folder"
