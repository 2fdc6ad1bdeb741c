"""One run from its recipe to a trained model: data, base, reference, steps; each part timed and accounted for."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import assert_never

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from qlora_dpo.data.encode import PairSet, load_pairs
from qlora_dpo.data.encoded import EncodedPair, digests, only_chosen
from qlora_dpo.data.lazy_sequence import joined
from qlora_dpo.data.progress import Watch, unwatched
from qlora_dpo.errors import RecipeError
from qlora_dpo.model.base import load_base, load_tokenizer, tokenizer_fingerprints
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes, sharding
from qlora_dpo.model.fused_lora import make_lean
from qlora_dpo.model.lora import attach
from qlora_dpo.model.memory import (
    checkpoint,
    free_bytes,
    freed_at_once,
    give_back_freed_memory,
    keep_dense_if_it_fits,
    keep_freed_memory,
)
from qlora_dpo.model.saved_adapter import opened_by_peft, put
from qlora_dpo.model.sources import Source, fetch
from qlora_dpo.preference.pack import Packing
from qlora_dpo.preference.packing_choice import choose_packing, shortest
from qlora_dpo.preference.reference import guard_adapter, guard_opened, probe
from qlora_dpo.preference.reference_adapter import Held, copied
from qlora_dpo.preference.token_weights import counted
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.recipe.objective import Sft
from qlora_dpo.recipe.recipe import LoadedRecipe
from qlora_dpo.recipe.reference import EmaReference
from qlora_dpo.tracking import run_log as tracking
from qlora_dpo.tracking.run_log import Tracker
from qlora_dpo.training import reference_pass
from qlora_dpo.training.checkpoint.best import load_best
from qlora_dpo.training.checkpoint.save import State, rows_before
from qlora_dpo.training.data_order import make_plan
from qlora_dpo.training.evaluate import Side
from qlora_dpo.training.loop import Ask, Job, fit, peak_bytes
from qlora_dpo.training.loss_columns import column_keys, columns_of
from qlora_dpo.training.meta_model import Load as MostTokens
from qlora_dpo.training.meta_model import Shapes, load_of, shapes_of
from qlora_dpo.training.reference_pass import Model, Named, ask_other, find_named, insist_on_moves, question
from qlora_dpo.training.row_plan import (
    adapter_bytes,
    choose_rows,
    converted_bytes,
    decisions,
    left_for_dense,
    reference_rows,
)

PROBED = 128
"""Tokens of a prompt's end and of an answer's beginning on which it is proved that the base is the base."""


@dataclass
class Prepared:
    """Everything that was read before the first weight: tokenizer, pairs and the source of the base."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    train: PairSet
    heldout: PairSet
    named: Named = field(default_factory=Named)
    seconds: dict[str, float] = field(default_factory=dict)
    both_answers: PairSet | None = None
    """The training pairs as read, of which `train` may have the chosen answers alone."""
    proved: set[Path] = field(default_factory=set)
    """Stores whose answers were proved by the other model that gave them, for the next run with the same pairs."""


@dataclass(frozen=True)
class Base:
    """The base before an adapter, how pairs are laid out for it, and its logits (L, V) of one pair, to prove it by."""

    model: PreTrainedModel
    packing: Packing
    probed: EncodedPair
    before_LV: Tensor
    dense: bool = False
    """True if the linear weights are kept in the compute dtype beside their stored form."""


Load = Callable[[Prepared, Recipe, Device, Callable[[str], None]], Base]
"""How a run comes by its base; the last argument is told what was decided."""


@dataclass
class Outcome:
    """A trained model with all that run.json and results.json say about how it came to be."""

    model: PeftModel
    state: State
    prepared: Prepared
    reference_computed: int
    peak_bytes: int
    unsaved: list[str]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by part of the run."""
        return self.prepared.seconds


def prepare(
    recipe: Recipe,
    find: Callable[[ModelTable], Source] = fetch,
    others: Sequence[Recipe] = (),
    watch: Watch = unwatched,
) -> Prepared:
    """Fetch the base's files as `find` does, read and encode both sets of pairs; loads no weights.

    Of the rows are kept the columns that the objective reads, and those of the `others`, which train on the same pairs.
    `watch` is told how far the reading is. Of several processes on a machine the first reads alone, and the others find
    it in the cache.
    """
    with processes.main_first():
        return _prepared(recipe, find, others, watch)


def _prepared(recipe: Recipe, find: Callable[[ModelTable], Source], others: Sequence[Recipe], watch: Watch) -> Prepared:
    seconds: dict[str, float] = {}
    with timed(seconds, "fetch"):
        source = find(recipe.model)
        tokenizer = load_tokenizer(source)
        named = find_named(recipe, source, tokenizer)
    with timed(seconds, "encode"):
        seed = recipe.train.seed
        numbers = {name: key for each in (*others, recipe) for name, key in column_keys(each.objective).items()}
        groups = {recipe.samples.group_by: "samples.group_by"} if recipe.samples.group_by else {}
        train = load_pairs(recipe.data, "train", tokenizer, seed, numbers, watch)
        heldout = load_pairs(recipe.data, "eval", tokenizer, seed, numbers | groups, watch)
    return Prepared(source, tokenizer, _trained_on(train, recipe), heldout, named, seconds, train)


def prepare_again(before: Prepared, recipe: Recipe) -> Prepared:
    """The same base and pairs for another recipe; reads nothing but the adapters that it names."""
    seconds: dict[str, float] = {}
    with timed(seconds, "fetch"):
        named = find_named(recipe, before.source, before.tokenizer)
    train = _trained_on(before.both_answers or before.train, recipe)
    return replace(before, train=train, named=named, seconds=seconds)


def _trained_on(train: PairSet, recipe: Recipe) -> PairSet:
    """The training pairs as the objective takes them; of held-out pairs both answers are asked, for the accuracy."""
    return replace(train, encoded=only_chosen(train.encoded)) if isinstance(recipe.objective, Sft) else train


def run(
    prepared: Prepared,
    recipe: Recipe,
    device: Device,
    tracker: Tracker,
    resume_from: Path | None,
    allowed: tuple[str, ...] = (),
    ask: Ask | None = None,
    until: float = math.inf,
    load: Load | None = None,
) -> Outcome:
    """Load the base, ask the reference, prove the start, and train with the recipe's engine.

    A run that resumes may differ from the one before in the `allowed` keys. At evaluations the model is given to `ask`.
    The last step that ends before `until`, a time of `time.monotonic`, is followed by a checkpoint and Interrupted.
    `load` gives the base, where not `load_for` does.
    """
    seconds, pairs, heldout = prepared.seconds, prepared.train.encoded, prepared.heldout.encoded
    plan, named = make_plan(len(pairs), recipe.train), prepared.named
    insist_on_moves(recipe, plan)
    what = question(recipe, named, prepared.source, device, plan, pairs, heldout)
    with timed(seconds, "reference"):
        asked = ask_other(what, named, pad_token_id(prepared.tokenizer), tracker, prepared.proved)
    with timed(seconds, "load"):
        base = (load or load_for)(prepared, recipe, device, tracker.note)
        chosen = recipe.train.micro_batch_tokens == "auto"
        before = rows_before(resume_from) if chosen and resume_from is not None else None
        loaded = _with_adapter(base, prepared, recipe, device, tracker.note, before)
    with timed(seconds, "reference"):
        asked = asked or reference_pass.ask(what, loaded, tracker)
    model = loaded.model
    sides = (
        Side(pairs, asked.train_P2, columns_of(prepared.train.pairs, recipe.objective)),
        Side(heldout, asked.heldout_P2, columns_of(prepared.heldout.pairs, recipe.objective)),
    )
    job = Job(
        recipe, device, plan, *sides, loaded.packing, tracker.run_dir, what.store, loaded.held, allowed, until, ask
    )
    state = State(
        step=0,
        recipe=recipe.model_dump(exclude_none=True),
        fingerprints={
            "base": prepared.source.fingerprint,
            **tokenizer_fingerprints(prepared.tokenizer),
            "pairs": data_fingerprint(pairs),
            "heldout": data_fingerprint(heldout),
            **named.fingerprints,
        },
        row_tokens=loaded.packing.token_budget if chosen else None,
    )
    processes.insist_on_same(state.fingerprints)
    with timed(seconds, "train"):
        match recipe.train.engine:
            case "qlora_dpo":
                state = fit(model, job, state, tracker, resume_from)
            case "trl":
                from qlora_dpo.training.trl_engine import fit_with_trl

                if resume_from is not None or until < math.inf:
                    option = "--max-hours" if resume_from is None else "--resume"
                    raise RecipeError(f'{option} needs train.engine = "qlora_dpo"; TRL\'s checkpoints are pickled')
                model, state = fit_with_trl(model, job, state, tracker, prepared.tokenizer)
            case never:
                assert_never(never)
    if state.best is not None and processes.is_main():
        load_best(tracker.run_dir, state.best, model)
        tracker.note(f"the adapter is that of step {state.best}, the best by {recipe.train.metric_for_best_model}")
    return Outcome(model.eval(), state, prepared, what.store.computed_by_all(), peak_bytes(device), job.unsaved)


def load_for(prepared: Prepared, recipe: Recipe, device: Device, say: Callable[[str], None]) -> Base:
    """The base as this machine computes best with it, and the layout that is proved for these pairs."""
    table, own = recipe.train, recipe.train.engine == "qlora_dpo"
    pairs, pad = joined([prepared.train.encoded, prepared.heldout.encoded]), pad_token_id(prepared.tokenizer)
    with freed_at_once() if device.type == "cpu" else nullcontext():
        base = load_base(prepared.source, recipe.model, device)
    dense = False
    if own and not processes.sharded():
        shapes, most = _shapes(prepared, recipe, device)
        free = max(0, free_bytes(device) - sum(adapter_bytes(shapes, recipe).values()))
        longest = most.alone(padded=bool(shapes.padded))
        dense, words = keep_dense_if_it_fits(base, device, left_for_dense(shapes, table, longest, free, device))
        say(words)
    if own and device.type == "cpu":
        keep_freed_memory()
    packing, why = choose_packing(base, pairs, table.row_tokens, pad, device)
    say(f"layout: {why}")
    (probed,) = shortest(pairs, 1)
    # its logits exist whole: 0.15 GiB for 256 tokens and 152k words; until the proof they lie on the CPU
    probed = replace(probed, prompt=probed.prompt[-PROBED:], chosen=probed.chosen[:PROBED])
    return Base(base, packing, probed, probe(base, probed, device).cpu(), dense)


def _shapes(prepared: Prepared, recipe: Recipe, device: Device) -> tuple[Shapes, MostTokens]:
    """What the plan before the run was made of, and what goes through the model at most."""
    most = load_of(prepared.train, prepared.heldout, recipe)
    return shapes_of(prepared.source, recipe, device, most), most


def _with_adapter(
    base: Base, prepared: Prepared, recipe: Recipe, device: Device, say: Callable[[str], None], before: int | None
) -> Model:
    """The base with an adapter that is proved to be untrained, or the one that training goes on from.

    A part of the run before this one has had rows of so many tokens, where the recipe does not say it: "auto".
    """
    own = recipe.train.engine == "qlora_dpo"
    packing = replace(base.packing, token_budget=before or recipe.train.row_tokens)
    model, held = _attached(base.model, prepared.named, recipe, base.probed, device)
    if own:
        say(make_lean(model, device.torch_dtype))
    if processes.sharded():
        say(sharding.share_out(model, device))
    for sentence in prepared.named.notes:
        say(sentence)
    before_LV = base.before_LV.to(device.torch_device)
    guard_adapter(model, before_LV, base.probed, packing, device, fresh=prepared.named.start is None)
    rows = packing
    if own:
        packing, rows = _as_memory_allows(model, base, prepared, recipe, device, say, before)
    if device.type == "cpu":
        give_back_freed_memory()  # what the proofs took: blocks of other lengths than a step's
    weighed = counted(recipe.objective)
    return Model(model, replace(packing, counted=weighed), replace(rows, counted=weighed), held)


def _as_memory_allows(
    model: PeftModel,
    base: Base,
    prepared: Prepared,
    recipe: Recipe,
    device: Device,
    say: Callable[[str], None],
    before: int | None,
) -> tuple[Packing, Packing]:
    """The rows of training, with as many layers recomputed as memory asks for, and those of the reference pass."""
    shapes, most = _shapes(prepared, recipe, device)
    to_come = 4 * shapes.trained + shapes.optimizer + (0 if base.dense else converted_bytes(shapes, recipe, device))
    longest, free = most.alone(padded=base.packing.backend is None), max(0, free_bytes(device) - to_come)
    free = processes.least(free)  # so that all have the same rows
    chosen = choose_rows(shapes, recipe.train, longest, free, before)
    for sentence in decisions(shapes, recipe.train, chosen, longest, free):
        say(f"memory: {sentence}")
    checkpoint(model, chosen.recomputed)
    asked = reference_rows(shapes, chosen, longest, device)
    return replace(base.packing, token_budget=chosen.tokens), replace(base.packing, token_budget=asked)


def _attached(
    base: PreTrainedModel, named: Named, recipe: Recipe, probed: EncodedPair, device: Device
) -> tuple[PeftModel, Held]:
    """The base with the adapter that training starts from, and what the reference is; saved adapters are proved."""
    saved = [each for each in dict.fromkeys((named.frozen, named.start)) if each is not None]
    opened_LV = {}
    for each in saved:
        with opened_by_peft(base, each) as opened:
            opened_LV[each] = probe(opened, probed, device)
    model, frozen = attach(base, recipe.lora, recipe.train.seed).eval(), None  # new layers would drop out inputs
    for each in saved:
        put(model, each)
        guard_opened(model, opened_LV[each], probed, device, each.folder)
        if each == named.frozen:
            frozen = copied(model)
    if isinstance(recipe.reference, EmaReference):
        return model, Held(copied(model), recipe.reference)
    return model, Held(frozen)


def follow(prepared: Prepared, loaded: LoadedRecipe, folder: Path, resume_from: Path | None) -> Tracker:
    """The tracker of this run, to be entered with `with`; a resumed run's metrics are cut to its checkpoint's step.

    Of several processes the first alone writes and speaks.
    """
    start = int(resume_from.name.removeprefix("step-")) if resume_from else 0
    if processes.is_main():
        for name in (tracking.METRICS, tracking.SAMPLES):
            tracking.cut(folder / name, start if resume_from else -1)
    return Tracker(
        folder,
        make_plan(len(prepared.train.encoded), loaded.recipe.train).total_steps,
        start_step=start,
        track=loaded.recipe.track,
        config=loaded.recipe.model_dump(exclude_none=True),
        name=folder.resolve().name,
        silent=not processes.is_main(),
    )


def data_fingerprint(pairs: Sequence[EncodedPair]) -> str:
    """SHA-256 over the token ids of all pairs in their order."""
    return hashlib.sha256(digests(pairs).tobytes()).hexdigest()


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, which `load_tokenizer` makes sure of."""
    return int(tokenizer.pad_token_id or 0)


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the time spent inside to `seconds[part]`."""
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[part] = seconds.get(part, 0.0) + time.monotonic() - started
