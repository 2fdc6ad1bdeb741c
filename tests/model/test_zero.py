"""DeepSpeed's ZeRO-2 and ZeRO-3 give the adapter and figures of one process; `pip install 'qlora_dpo[deepspeed]'`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import distributed_scenarios
import pytest
import tiny_run
import torch
from rank_results import Together
from safetensors.torch import load_file

from qlora_dpo.errors import RecipeError

pytestmark = [
    tiny_run.LIBRARIES_WARN,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Together:
    return Together(request.param, tmp_path_factory.mktemp("zero"), zero=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    return {name: distributed_scenarios.scenario(name, folder / name) for name in distributed_scenarios.ZERO}


@pytest.mark.parametrize("name", distributed_scenarios.ZERO)
def test_with_deepspeed_processes_have_the_adapter_and_the_figures_of_one(
    name: str, several: Together, alone: dict[str, Any]
) -> None:
    several.insist_on_same(name, *alone[name])


@pytest.mark.parametrize("name", [name for name in distributed_scenarios.ZERO if name.startswith("zero3")])
def test_each_keeps_a_part_of_the_layers_and_the_first_can_use_the_whole_model_alone(
    name: str, several: Together, alone: dict[str, Any]
) -> None:
    parts, whole = [found[name]["layer_bytes"] for found in several.found], alone[name][1]["layer_bytes"]
    # the first layer's turn ends with the next forward pass, and parts are filled up to one length
    assert max(parts) <= 1.2 * whole / several.count
    assert sum(parts) >= whole
    for found, expected in zip(several.found[0][name]["asked"], alone[name][1]["asked"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_of_shared_state_is_that_of_one_process_and_all_or_one_go_on_from_it(
    several: Together, alone: dict[str, Any], tmp_path: Path
) -> None:
    folder = several.folder / "stopped"
    saved = folder / "checkpoints" / "step-000002"
    assert {found["stopped"] for found in several.found} == {
        f"stopped after step 2 as asked; {saved} is saved, --resume goes on from there"
    }
    assert {found["resumed"] for found in several.found} == {""}
    assert tiny_run.all_apart(load_file(folder / "adapter.safetensors"), alone["zero2"][0]) < 1e-5
    moments = load_file(saved / "optimizer.safetensors")
    assert moments
    assert all(torch.equal(value, torch.tensor(2.0)) for name, value in moments.items() if name.startswith("step|"))
    assert distributed_scenarios.stopped(folder, "zero2", resume=True) == ""
    assert tiny_run.all_apart(load_file(folder / "adapter.safetensors"), alone["zero2"][0]) < 1e-5


def test_an_optimizer_that_looks_at_matrices_is_refused() -> None:
    from qlora_dpo.training.zero2_optimizer import check_elementwise

    check_elementwise(tiny_run.recipe().train)
    with pytest.raises(RecipeError, match=r'train\.optim = "adafactor" cannot be sharded by ZeRO-2, .*; take'):
        check_elementwise(tiny_run.recipe(train={"optim": "adafactor"}).train)
