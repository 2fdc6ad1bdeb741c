"""A packed row runs each prompt through recurrent layers once, and its answers have what they have alone."""

import random
from itertools import pairwise
from typing import Any

import architectures
import model_families
import numpy as np
import pytest
import tiny_run
import torch

from qlora_dpo.data.encoded import EncodedPair, digest_ids
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora
from qlora_dpo.model.packed import recurrent
from qlora_dpo.model.packed.recurrent import Branches, branches_of, recurrent_layers
from qlora_dpo.model.packed.span import Span
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.preference.packing_choice import choose_packing

pytestmark = tiny_run.LIBRARIES_WARN

EXACT = 1e-5
"""Relative, in float32."""
CONFIGS = {
    **{family.name: family.config for family in model_families.FAMILIES},
    "Bamba": lambda: architectures.tiny_config("Bamba", **architectures.FAMILIES["Bamba"], vocab_size=400),
    "Mamba 2": lambda: architectures.tiny_config("Mamba2", **architectures.FAMILIES["Mamba2"], vocab_size=400),
}
KINDS = [
    *("Qwen3.5, dense", "LFM2", "Granite 4, hybrid", "Nemotron 3 and H"),
    *("Qwen3-Next", "Falcon-H1", "Bamba", "Mamba 2"),
]
BUDGET = 400


def pairs(count: int, seed: int = 0) -> list[EncodedPair]:
    """Pairs with a system prompt, prompts of several pairs, later turns, answers that begin alike, and short ones."""
    draw = random.Random(seed)

    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 390) for _ in range(draw.randint(least, most)))

    system, made = ids(5, 9), list[EncodedPair]()
    while len(made) < count:
        earlier = made[-1] if made else None
        prompt = system + ids(1, 70)
        if earlier and len(made) % 3 == 1:
            prompt = earlier.prompt
        if earlier and len(made) % 3 == 2:
            prompt = earlier.prompt + earlier.chosen + ids(1, 5)
        alike = ids(1, 3) if draw.random() < 0.5 else ()
        chosen, rejected = alike + ids(1, 30), alike + ids(1, 30)
        made.append(EncodedPair(prompt, chosen, rejected, len(made) + 1, digest_ids(prompt, chosen, rejected)))
    return made


def tuned(kind: str, *, lean: bool = False) -> Any:
    """A model of this kind whose recurrence matters, with an adapter that does something."""
    base = tiny_run.stirred(architectures.made(CONFIGS[kind]()))
    for name, weight in base.named_parameters():
        if name.endswith("dt_bias"):
            weight.data[::2] = -9.0  # time steps below the lower limit that some families have
    model = tiny_run.stirred(attach_lora(base, tiny_run.recipe().lora, 0))
    if lean:
        fuse_lora(model, torch.float32)
    return model.train()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_exact_for_recurrent_models(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, padded = pairs(9), Packing(BUDGET, tiny_run.PAD, backend=None)
    wanted = tiny_run.logps_and_gradients(tuned(kind), given, padded)
    model = tuned(kind, lean=True)
    assert recurrent_layers(model)
    packing, reason = choose_packing(model.eval(), given, padded, tiny_run.CPU)
    assert packing.backend == "spans", reason
    assert len(micro_batches(given, packing)) < len(given)
    found = tiny_run.logps_and_gradients(model.train(), given, packing)
    assert tiny_run.apart(found[0], wanted[0]) < EXACT
    assert tiny_run.apart(found[1], wanted[1]) < EXACT
    # and what is exact depends on the branches: without them answers see each other
    monkeypatch.setattr(recurrent, "branches_of", lambda layout: Branches((Span(0, layout.spans[-1].stop),)))
    wrong = tiny_run.logps_and_gradients(model, given, packing)
    assert tiny_run.apart(wrong[0], wanted[0]) > 100 * EXACT


def test_without_a_layout_a_model_computes_what_it_computed() -> None:
    ids = torch.arange(3, 40)[None]
    model = tuned("Qwen3.5, dense").eval()
    before = model(input_ids=ids).logits
    choose_packing(model, pairs(3), tiny_run.PADDED, tiny_run.CPU)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_row_is_cut_where_sequences_part() -> None:
    """Two questions after one system prompt (0-4), each with two answers; one pair of answers begins alike (11-13)."""
    spans = (Span(0, 9), Span(9, 11, ((0, 7),)), Span(11, 20, ((0, 4),)), Span(20, 22, ((0, 4), (11, 17))))
    branches = Branches(spans)
    assert branches.segments == [(0, 4), (4, 7), (7, 9), (9, 11), (11, 17), (17, 20), (20, 22)]
    assert branches.parents == [None, 0, 1, 1, 0, 4, 4]
    assert branches.levels == [[0], [1, 4], [2, 3, 5, 6]]
    assert sorted(s for batch in branches.batches for s in batch) == [*range(7)]
    sequences = [
        [*range(9)],
        [*range(7), 9, 10],
        [*range(4), *range(11, 20)],
        [*range(4), *range(11, 17), 20, 21],
    ]
    token_F, taps_FK = branches.taps(4)
    tap_of = dict(zip(token_F.tolist(), taps_FK.tolist(), strict=True))
    for sequence in sequences:
        for place, token in enumerate(sequence):
            wanted = [-1] * max(0, 3 - place) + sequence[max(0, place - 3) : place + 1]
            near = [max(token - back, -1) for back in (3, 2, 1, 0)]
            assert tap_of.get(token, near) == wanted, token
    assert sorted(tap_of) == [9, 10, 11, 12, 13, 20, 21]


def test_segments_of_a_level_share_a_batch_where_they_are_of_similar_length() -> None:
    lengths = (90, 40, 65, 5, 20, 200, 61)
    starts = np.cumsum([0, *lengths]).tolist()
    branches = Branches(tuple(Span(*bounds) for bounds in pairwise(starts)))
    assert branches.levels == [[*range(7)]]
    assert [[lengths[s] for s in batch] for batch in branches.batches] == [[200], [90, 65, 61], [40], [20, 5]]


def test_a_single_sequence_has_one_segment_and_no_branch() -> None:
    branches = branches_of(collate([EncodedPair((1, 2, 3), (4, 5), (), 1, b"")], tiny_run.PACKED).layout)  # type: ignore[arg-type]
    assert (branches.segments, branches.parents, branches.levels) == ([(0, 5)], [None], [[0]])
    assert len(branches.taps(4)[0]) == 0
    assert np.array_equal(branches.previous, np.arange(-1, 4))
