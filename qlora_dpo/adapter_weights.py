"""Loads the tensors of an adapter file into a model, also where another tool has named them otherwise than PEFT."""

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.errors import ModelError, first_line
from qlora_dpo.manifest import MANIFEST, find_damage
from qlora_dpo.model import dora, modules_to_save
from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

PREFIX = "base_model.model."
"""What PEFT writes before each name of the base."""

logger = logging.getLogger(__name__)

_TENSOR = re.compile(
    r"\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)(?P<rest>(?:\.[^.]+)*)$"
)
_WHOLE_COPY = re.compile(r"\.modules_to_save(?:\.(?P<adapter>[^.]+))?(?=\.(?:weight|bias)$)")
_NO_TEXT = re.compile(r"(?:^|[._])(?:vision|visual|vit|image|audio|speech|video)", re.IGNORECASE)
"""Parts of a multimodal model that read no text, by their usual names."""


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter file under PEFT's names, with the config that goes with these names."""

    folder: Path
    config: Any
    tensors: dict[str, Tensor]
    note: str = ""
    """How the names were translated, in words; empty if they are PEFT's."""


def attach_adapter(model: Any, folder: Path) -> PeftModel:
    """Attach the adapter of `folder` to its base `model`, in evaluation mode, with every tensor of its file in place.

    The embeddings are resized if the file holds them for another vocabulary. Raises ModelError, with the reason.
    """
    saved = _read_adapter(folder, model)
    _resize_vocabulary(model, saved)
    try:
        peft: Any = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(saved.config.task_type, PeftModel)(model, saved.config)
    except (ValueError, RuntimeError, KeyError, TypeError, IndexError) as error:
        raise ModelError(f"{folder}: the adapter cannot be attached to its base: {_first_line(error)}") from error
    _place_tensors(peft, saved, "default")
    if modules_to_save.trained_copies(peft):
        # PEFT rounds them to the dtype of the base; they were trained in float32
        for module in modules_to_save.trained_copies(peft).values():
            module.float()
        set_peft_model_state_dict(peft, dict(saved.tensors))
        modules_to_save.keep_output_dtypes(peft)
    dora.use_exact_norms(peft)
    if replaced := replaced_tensors(peft, saved.tensors):
        logger.info(
            f"{folder}: holds {len(replaced)} whole tensors of the base, such as {min(replaced)}, which replace the "
            "base's own, also where the adapter is switched off"
        )
    peft.replaced_tensors = replaced
    opened: PeftModel = peft.eval()
    return opened


def add_adapter(model: PeftModel, folder: Path, name: str) -> None:
    """Load the adapter of `folder` under `name` beside those that `model` has; raises ModelError, with the reason."""
    saved = _read_adapter(folder, model.get_base_model())
    try:
        model.add_adapter(name, saved.config)
    except (ValueError, RuntimeError, KeyError, TypeError, IndexError) as error:
        raise ModelError(f"{folder}: the adapter cannot be attached to its base: {_first_line(error)}") from error
    if replaced := replaced_tensors(model, saved.tensors):
        raise ModelError(
            f"{folder}: holds whole tensors of the base, such as {min(replaced)}, which all adapters of one base would "
            "share; open it by itself"
        )
    _place_tensors(model, saved, name)
    dora.use_exact_norms(model)
    model.eval()


def replaced_tensors(model: PeftModel, names: Iterable[str]) -> frozenset[str]:
    """Those of the `names` in an adapter file that are tensors of the base itself, as the base's files name them."""
    known = {name.removeprefix(PREFIX) for name in model.state_dict()}
    copies = modules_to_save.trained_copies(model)
    return frozenset(
        base_name(name)
        for name in (name.removeprefix(PREFIX) for name in names)
        if name in known and not _TENSOR.search(name) and name.rpartition(".")[0] not in copies
    )


def base_name(name: str) -> str:
    """The name of a module or tensor of the base as the base's files have it, without PEFT's wrappers."""
    return re.sub(r"\.(?:base_layer|original_module|token_adapter)(?=\.|$)", "", name)


def check_undamaged(folder: Path) -> None:
    """Raise ModelError if the adapter of `folder` differs from its manifest, if it has one."""
    if not (folder / MANIFEST).is_file() or not (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        return
    if damaged := find_damage(folder, required=ADAPTER_SAFE_WEIGHTS_NAME):
        raise ModelError(f"{folder}: is damaged: {damaged}; take it from a backup, or train again with --resume")


def _read_adapter(folder: Path, base: Any) -> AdapterTensors:
    """The adapter's tensors, with their names translated to those of `base` where they differ."""
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / ADAPTER_SAFE_WEIGHTS_NAME)
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: has no {ADAPTER_SAFE_WEIGHTS_NAME}{_conversion_hint(folder)}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: the adapter cannot be attached to its base: {_first_line(error)}") from error
    config.inference_mode = True
    names, note = _without_adapter_name(tensors, folder)
    saved = AdapterTensors(folder, config, {names[name]: tensor for name, tensor in tensors.items() if name in names})
    saved = _in_names_of(base, AdapterTensors(folder, config, saved.tensors, note))
    if saved.note:
        logger.info(f"{folder}: {saved.note}")
    return saved


def _without_adapter_name(tensors: Mapping[str, Tensor], folder: Path) -> tuple[dict[str, str], str]:
    """PEFT's name for each tensor that is kept, and what was done, in words.

    A state dict that was saved as it is has the adapter's name in every key, as in lora_A.default.weight; PEFT writes
    its files without.
    """
    parsed = {name: _parse_name(name) for name in tensors}
    adapters = sorted({adapter for _, adapter in parsed.values() if adapter})
    if len(adapters) > 1 and "default" not in adapters:
        raise ModelError(
            f"{folder}: holds the tensors of {len(adapters)} adapters ({sanitize_text(', '.join(adapters))}); save one "
            "of them with PEFT: model.save_pretrained(FOLDER, selected_adapters=[NAME])"
        )
    kept = "default" if "default" in adapters else (adapters or [""])[0]
    names = {name: plain for name, (plain, adapter) in parsed.items() if plain and adapter in ("", kept)}
    if not adapters:
        return names, ""
    others = f", and {', '.join(each for each in adapters if each != kept)} left out" if len(adapters) > 1 else ""
    return names, sanitize_text(f'its tensors carry the name of their adapter, ".{kept}."; read without it{others}')


def _parse_name(name: str) -> tuple[str, str]:
    """PEFT's name of a tensor, empty if it is not needed, and the adapter named in it, empty if there is none."""
    plain = name.removeprefix("module.").replace("_orig_mod.", "")
    if not plain.startswith(PREFIX):
        plain = PREFIX + plain.removeprefix("base_model.")
    if ".original_module." in plain:  # the base's own, beside the trained copy
        return "", ""
    if copied := _WHOLE_COPY.search(plain):
        return _WHOLE_COPY.sub("", plain), copied["adapter"] or ""
    found = _TENSOR.search(plain)
    if found is None:
        return plain, ""
    parts = found["rest"].split(".")[1:]
    has_weight = found["kind"] in ("lora_A", "lora_B")
    # PEFT's own are lora_A.weight and lora_B.bias, and for all other kinds no part after the kind
    suffix = parts.pop() if parts and parts[-1] in ("weight", "bias") else ""
    return plain[: found.start("rest")] + (f".{suffix}" if has_weight and suffix else ""), ".".join(parts)


def _in_names_of(base: Any, saved: AdapterTensors) -> AdapterTensors:
    """`saved` with the names of `base`, if that is the language model inside a multimodal one, or the other way round.

    The layers of one are model.layers, of the other model.language_model.layers, language_model.model.layers, ...
    """
    modules = {base_name(name) for name, _ in base.named_modules()}
    paths = {name: _module_path(name) for name in saved.tensors}
    unknown = sorted({path for path in paths.values() if path not in modules})
    renamed = _renamed_prefixes(unknown, modules)
    if lost := [path for path in unknown if _NO_TEXT.search(path)]:
        raise ModelError(
            f"{saved.folder}: also adapts parts that read no text, such as {sanitize_text(lost[0])}, and its base here "
            "has no such part; name the whole model with --base-model"
        )
    moved = {path: new for path in unknown if (new := _move(path, renamed)) != path}
    if not moved:
        return saved
    if taken := sorted(set(moved.values()) & set(paths.values())):
        raise ModelError(f"{saved.folder}: has two tensors for {sanitize_text(taken[0])} of its base; save it anew")
    tensors = {_move_name(name, paths[name], moved): tensor for name, tensor in saved.tensors.items()}
    config = _config_for(saved.config, tensors, {new: old for old, new in moved.items()})
    old, new = min(moved.items())
    note = f"its layers are named as in {sanitize_text(old)}, which is {new} in this base; read as the same layers"
    return AdapterTensors(saved.folder, config, tensors, "; ".join(filter(None, (saved.note, note))))


def _module_path(name: str) -> str:
    """The module of the base that a tensor of an adapter file belongs to."""
    found = _TENSOR.search(name)
    return base_name((name[: found.start()] if found else name.rpartition(".")[0]).removeprefix(PREFIX))


def _renamed_prefixes(unknown: list[str], modules: set[str]) -> dict[str, str]:
    """The beginnings of `unknown` paths whose rest is, after another beginning, a path of `modules`."""
    renamed: dict[str, str] = {}
    for path in unknown:
        if _move(path, renamed) != path or _NO_TEXT.search(path):
            continue
        parts = path.split(".")
        # The rest keeps the number of the layer, so that no layer is taken for another one
        numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
        for cut in range(numbers[0] if numbers else len(parts)):
            rest = ".".join(parts[cut:])
            before = {
                module.removesuffix(rest).removesuffix(".")
                for module in modules
                if (module == rest or module.endswith(f".{rest}")) and not _NO_TEXT.search(module)
            }
            before = {prefix for prefix in before if not any(part.isdecimal() for part in prefix.split("."))}
            if len(before) == 1:
                renamed[".".join(parts[:cut])] = before.pop()
                break
    return renamed


def _move(path: str, renamed: Mapping[str, str]) -> str:
    """`path` with its beginning renamed; the longest beginning counts."""
    for old in sorted(renamed, key=len, reverse=True):
        if not old or path == old or path.startswith(f"{old}."):
            rest = path.removeprefix(old).removeprefix(".")
            return f"{renamed[old]}.{rest}".removeprefix(".")
    return path


def _move_name(name: str, path: str, moved: Mapping[str, str]) -> str:
    """The name of a tensor after its module has moved."""
    if path not in moved:
        return name
    rest = base_name(name.removeprefix(PREFIX)).removeprefix(path)
    return PREFIX + moved[path] + (".base_layer" if ".base_layer." in name else "") + rest


def _config_for(config: Any, tensors: Mapping[str, Tensor], former: Mapping[str, str]) -> Any:
    """`config` with the modules named one by one, since a pattern for the `former` names would match none."""
    config = copy.copy(config)
    ranks: dict[str, int] = {}
    for name, tensor in tensors.items():
        found = _TENSOR.search(name)
        if found and found["kind"] in ("lora_A", "lora_embedding_A"):
            ranks[_module_path(name)] = len(tensor)
    alphas = {}
    for module in ranks:
        key = get_pattern_key(config.alpha_pattern, former.get(module, module))
        alphas[module] = config.alpha_pattern.get(key, config.lora_alpha)
    config.target_modules, config.exclude_modules, config.layers_to_transform = set(ranks), None, None
    config.rank_pattern = {re.escape(module): r for module, r in ranks.items() if r != config.r}
    config.alpha_pattern = {re.escape(m): alpha for m, alpha in alphas.items() if alpha != config.lora_alpha}
    return config


def _resize_vocabulary(model: Any, saved: AdapterTensors) -> None:
    """Resize the embeddings of `model` if the adapter file holds embeddings for another vocabulary."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    paths = [names[id(module)] for module in (embeddings, head) if module is not None]
    rows = len(embeddings.weight)
    whole, update = {}, {}
    for name, tensor in saved.tensors.items():
        path, found = _module_path(name), _TENSOR.search(name)
        if path in paths and found is None and tensor.dim() == 2:
            whole[path] = len(tensor)
        elif path in paths and found and found["kind"] in ("lora_embedding_A", "lora_B") and tensor.dim() == 2:
            update[path] = tensor.shape[1] if found["kind"] == "lora_embedding_A" else len(tensor)
    wanted = {size for size in (*whole.values(), *update.values()) if size != rows}
    trained_tokens = [index for index in _trained_token_indices(saved.config) if index >= rows]
    resized = "was trained on a base whose vocabulary was resized"
    if len(wanted) > 1:
        raise ModelError(
            f"{saved.folder}: {resized}, but its embeddings and head have {sorted(wanted)} rows; save it anew"
        )
    if not wanted and trained_tokens:
        raise ModelError(
            f"{saved.folder}: trained the token {max(trained_tokens)}, and this base has {rows}; name the base "
            "with the resized vocabulary with --base-model, or save the adapter with model.save_pretrained(FOLDER, "
            "save_embedding_layers=True)"
        )
    if not wanted:
        return
    (size,) = wanted
    tied = head is not None and head.weight is embeddings.weight
    missing = [] if tied and whole else [path for path in paths if whole.get(path) != size]
    if missing:
        raise ModelError(
            f"{saved.folder}: {resized} from {rows} to {size} tokens, and it does not hold {sanitize_text(missing[0])} "
            "of that base; save the resized base too and name it with --base-model, or save the adapter with "
            "model.save_pretrained(FOLDER, save_embedding_layers=True)"
        )
    model.resize_token_embeddings(size, mean_resizing=False)
    logger.info(f"{saved.folder}: holds embeddings of {size} tokens, so those of the base, {rows}, are resized")


def _trained_token_indices(config: Any) -> list[int]:
    indices = getattr(config, "trainable_token_indices", None) or []
    return [index for each in indices.values() for index in each] if isinstance(indices, dict) else list(indices)


def _place_tensors(model: PeftModel, saved: AdapterTensors, name: str) -> None:
    """Copy the tensors into the adapter `name`; raises ModelError unless each has its place, and each place one."""
    folder = saved.folder
    try:
        result = set_peft_model_state_dict(model, dict(saved.tensors), name)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        if mismatch := re.search(r"size mismatch for (\S+):", str(error)):
            raise ModelError(
                f"{folder}: was made for a base of another size: {sanitize_text(mismatch[1])} does not fit this one; "
                f"name the right base with --base-model, or as base_model_name_or_path in {ADAPTER_CONFIG_NAME}"
            ) from error
        raise ModelError(f"{folder}: the adapter cannot be attached to its base: {_first_line(error)}") from error
    except KeyError as error:
        raise ModelError(f"{folder}: lacks a tensor that its config asks for: {_first_line(error)}") from error
    if saved.config.is_prompt_learning:
        return
    missing = set(result.missing_keys) & _adapter_places(model, name)
    # Head and embeddings that are tied share the rows of trained tokens; a file may hold them twice
    tied = [path for path, module in model.named_modules() if getattr(module, "tied_adapter", None)]
    unknown = [key for key in (*missing, *result.unexpected_keys) if not key.startswith(tuple(f"{p}." for p in tied))]
    if unplaced := sorted({key.replace(f".{name}", "") for key in unknown}):
        raise ModelError(
            f"{folder}: {len(unplaced)} tensors do not fit the base, for example {sanitize_text(unplaced[0])}"
        )


def _adapter_places(model: PeftModel, name: str) -> set[str]:
    """The names of all parameters of the adapter `name` in the model's own state dict."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    wrappers = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, kinds))
    keys = {key for key in model.state_dict() if key.startswith(wrappers) and f".{name}" in key}
    return {key for key in keys if "trainable_tokens_original" not in key}  # the base's own rows, which no file holds


def _conversion_hint(folder: Path) -> str:
    """How to convert a pickled adapter, if there is one; pickles are never loaded here."""
    pickled = next((file.name for ending in ("*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(ending))), None)
    if pickled is None:
        return ""
    return (
        f", and {pickled} is pickled, which can run code and is not read; if you trust it, convert it: python -c "
        f"\"import torch, safetensors.torch as s; s.save_file(torch.load('{pickled}', weights_only=True), "
        f"'{ADAPTER_SAFE_WEIGHTS_NAME}')\" in that folder"
    )


def _first_line(error: Exception) -> str:
    return sanitize_text(first_line(error))
