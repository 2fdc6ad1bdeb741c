"""A GPU that is not there: tensors lie in the CPU's memory, and a note on their storage says which are on the card.

Inside `pretended_gpu(card)` a program finds one GPU. `torch.cuda` describes the card, and two modes of torch do the
rest. The one above autograd tells every tensor's device, turns moves between devices into copies, and casts as CUDA's
autocast does. The one below autograd sees the operations of the backward pass too. It carries the notes from inputs to
outputs, refuses what mixes devices as CUDA would, counts bytes and the times that the host waits for the GPU, runs out
of memory at a ceiling, and draws from a random generator of the GPU's own. Two kernels it computes otherwise than a CPU
does: bitsandbytes' fused 4-bit product, wherever bitsandbytes would take it on this card, and variable-length flash
attention.

What passes here has its tensors on the right devices and in dtypes that CUDA's operations take, stays within the range
and the precision of fp16 or bf16, handles the gradient scale, and keeps and frees tensors as counted.
It proves nothing of
- the kernels themselves: which shapes, strides and alignments they take, how they round, and in which order they add
  up, so a resumed run that is bit-equal here need not be so on a card;
- speed;
- memory beyond live tensors: workspaces of kernels, CUDA's context, and what fragmentation leaves of freed blocks;
- errors that CUDA reports later than they occur, and races between streams;
- several GPUs, NCCL, Triton and paged optimizers.

A command is run under it from a shell; the peak of its memory and its waits line by line follow on stderr:

    python tests/helpers/pretended_gpu.py --card t4 -- train recipes/quickstart.toml --set train.max_steps=2
"""

import argparse
import functools
import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, Literal
from unittest import mock

if __name__ == "__main__":  # as a script it finds the package beside it
    sys.path.insert(0, str(Path(__file__).parents[2]))

# When they are imported, libraries decide what they can do on this machine, so they come before a GPU is pretended.
import accelerate.state
import peft  # noqa: F401
import torch
import torch.utils.checkpoint
import transformers.utils.import_utils
from pretended_kernels import KERNELS, PRODUCT, backend_number, fused_kernel_rule
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_dpo
from qlora_dpo.model.gpu_specs import GPU_SPECS, GpuSpec

aten = torch.ops.aten
Place = Literal["cpu", "cuda"]
HERE, GPU = torch.device("cpu"), torch.device("cuda", 0)

BLOCK = 512
"""The caching allocator rounds every tensor up to a multiple of so many bytes."""
MULTIPROCESSORS = {
    "t4": 40,
    "rtx2080ti": 68,
    "rtx3060": 28,
    "rtx3090": 82,
    "rtx4060": 24,
    "rtx4090": 128,
    "rtx5090": 170,
    "a10": 72,
    "a10g": 80,
    "l4": 58,
    "l40s": 142,
    "a100-40gb": 108,
    "a100": 108,
    "h100": 132,
    "h200": 132,
}
"""How many multiprocessors CUDA counts on each of `CARDS`; bitsandbytes' rule reads it."""
PACKAGE = f"{Path(qlora_dpo.__file__).parent}/"


class MixedDevicesError(RuntimeError):
    """Tensors meet in an operation that must not on a GPU."""


@dataclass
class Block:
    """Where a storage is, and how much of the GPU it takes."""

    place: Place
    taken: int
    pinned: bool
    alive: "weakref.ref[torch.UntypedStorage]"


class Memory:
    """The GPU's memory: which storages are in it, how many bytes they take now and took at most."""

    def __init__(self) -> None:
        self.blocks: dict[int, Block] = {}
        self.now = self.peak = 0
        self.peak_at = ""
        """The line of qlora_dpo at which the peak was reached."""
        self.ceiling: int | None = None
        """Bytes at which it is full; None for no end."""
        self.arriving: set[int] = set()
        """Storages on the CPU to which the GPU was told to copy while the host went on."""

    def place_of(self, tensor: Tensor) -> Place | None:
        """Where a tensor is; None if nobody has said, as of what C++ makes of plain numbers."""
        block = self.blocks.get(tensor.untyped_storage()._cdata)
        return block.place if block else None

    def put(self, tensor: Tensor, place: Place, *, pinned: bool = False) -> None:
        """Note where a tensor is; raises OutOfMemoryError if the GPU has no room for it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self.blocks.get(key)
        if known is None:
            alive = weakref.ref(storage, functools.partial(self._freed, key))
            known = self.blocks[key] = Block("cpu", 0, pinned, alive)
        wanted = -(-storage.nbytes() // BLOCK) * BLOCK if place == "cuda" else 0
        if self.ceiling is not None and self.now + wanted - known.taken > max(self.ceiling, self.now):
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {wanted / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                f"{self.ceiling / 2**20:.2f} MiB of which {(self.ceiling - self.now) / 2**20:.2f} MiB is free."
            )
        self.now += wanted - known.taken
        if self.now > self.peak:
            self.peak, self.peak_at = self.now, _line()
        known.place, known.taken, known.pinned = place, wanted, pinned

    def is_pinned(self, tensor: Tensor) -> bool:
        """True for a tensor in page-locked memory, from which the GPU copies while the host goes on."""
        block = self.blocks.get(tensor.untyped_storage()._cdata)
        return block is not None and block.pinned

    def insist_on_arrival(self, keys: Iterable[int]) -> None:
        """Raise for storages that a copy without a wait may not have reached."""
        if self.arriving and not self.arriving.isdisjoint(keys):
            raise RuntimeError("a tensor is read to which a copy without a wait may not have come yet")

    def reset_peak(self) -> None:
        """Let the peak be what is taken now."""
        self.peak = self.now

    def _freed(self, key: int, _: object) -> None:
        self.now -= self.blocks.pop(key).taken
        self.arriving.discard(key)


class Generator:
    """The GPU's random generator: a seed, and how far it is, in 16 bytes as CUDA has them."""

    def __init__(self) -> None:
        self.seed = self.offset = 0

    def manual_seed(self, seed: int) -> None:
        """Begin anew."""
        self.seed, self.offset = int(seed) % 2**63, 0

    def state(self) -> Tensor:
        """Seed and offset as bytes."""
        return torch.tensor([self.seed, self.offset]).view(torch.uint8)

    def set_state(self, state: Tensor) -> None:
        """Go back to where `state` was taken."""
        if state.dtype != torch.uint8 or state.numel() != 16:
            raise RuntimeError("RNG state is wrong size")
        self.seed, self.offset = state.clone().view(torch.int64).tolist()

    @contextmanager
    def drawn_from(self) -> Iterator[None]:
        """Inside, what draws from the CPU's generator draws from this one."""
        before = torch.get_rng_state()
        torch.default_generator.manual_seed((self.seed * 1_000_003 + self.offset) % 2**63)
        begun = torch.get_rng_state()
        yield
        if not torch.equal(torch.get_rng_state(), begun):  # attention without dropout might draw, and does not
            self.offset += 4
        torch.set_rng_state(before)


class PretendedGPU:
    """What a program sees of the GPU, and what a test can learn of the program."""

    def __init__(self, card: GpuSpec, multiprocessors: int, *, fused: bool) -> None:
        self.card, self.multiprocessors = card, multiprocessors
        self.memory, self.generator = Memory(), Generator()
        self.waits: Counter[tuple[str, str]] = Counter()
        """How often the host waited, by what for and by the line of qlora_dpo, as `training/train_step.py:77`."""
        self.copies_without_wait = 0
        self.fused = fused
        self.products: Counter[str] = Counter()
        """How many of bitsandbytes' 4-bit products went which way."""
        self._thread = threading.local()

    @property
    def destination(self) -> Place | None:
        """Where everything that is made in this thread goes; None for where its inputs are."""
        found: Place | None = getattr(self._thread, "destination", None)
        return found

    @contextmanager
    def making(self, place: Place) -> Iterator[None]:
        """Inside, everything that is made in this thread is in `place`."""
        before, self._thread.destination = self.destination, place
        try:
            yield
        finally:
            self._thread.destination = before

    def wait(self, why: str) -> None:
        """Count that the host waits until the GPU has done all that it was told to."""
        self.waits[why, _line()] += 1
        self.memory.arriving.clear()

    def copy_between(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        """Count a copy from one device to the other.

        It needs no wait if it was asked to need none and is from page-locked memory, or to memory that the host reads
        later; from other memory CUDA copies to its own page-locked buffer first, after all that came before.
        """
        to_host = self.memory.place_of(target) != "cuda"
        if non_blocking and (to_host or self.memory.is_pinned(source)):
            self.copies_without_wait += 1
            if to_host:
                self.memory.arriving.add(target.untyped_storage()._cdata)
        else:
            self.wait("copy to the CPU" if to_host else "copy to the GPU")

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One operation as the GPU, the CPU or both together carry it out."""
        blocks, put, inputs = self.memory.blocks, self.memory.put, _tensors((*args, *kwargs.values()))
        keys = [each.untyped_storage()._cdata for each in inputs]
        places = [blocks[key].place if key in blocks else None for key in keys]
        on_gpu, on_cpu = "cuda" in places, "cpu" in places
        self.memory.insist_on_arrival(keys)
        if on_gpu and on_cpu:
            _insist_on_one_device(func, args, inputs, places)
        if on_gpu and func._overloadpacket in MAY_WAIT:
            for why in _waits(func, args, kwargs, self.memory):
                self.wait(why)
        destination: Place | None = self.destination or ("cuda" if on_gpu else "cpu" if on_cpu else None)
        found = self._computed(func, args, kwargs) if destination == "cuda" else func(*args, **kwargs)
        if destination is not None:
            for each in _tensors((found,)):
                key = each.untyped_storage()._cdata
                if key not in keys or key not in blocks:
                    put(each, destination)
        if func is aten.copy_.default and on_gpu and (places[0] or destination) != places[1]:
            self.copy_between(args[1], args[0], non_blocking=len(args) > 2 and args[2])
        return found

    def _computed(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if (kernel := KERNELS.get(func)) is not None and (func is not PRODUCT or self._takes_fused(args)):
            return kernel(*args, **kwargs) if func is PRODUCT else kernel(self.card.capability, *args)
        if not _draws(func):
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        with self.generator.drawn_from():
            return func(*args, **kwargs)

    def _takes_fused(self, args: Sequence[Any]) -> bool:
        """True if bitsandbytes would not dequantize the weight as a whole first, as where tokens are few."""
        input_MK, _, (words, width), _, blocksize, *_ = args
        tokens = input_MK.numel() // width
        takes = (
            self.fused
            and tokens <= backend_number("_gemm_4bit_custom_max_m")
            and width % blocksize == 0
            and fused_kernel_rule(self.multiprocessors, *self.card.capability)(0, input_MK.dtype, tokens, words, width)
        )
        self.products["fused" if takes else "dequantized"] += 1
        return bool(takes)

    def report(self) -> list[str]:
        """Peak and waits in lines, the most frequent wait first."""
        return [
            f"pretended {self.card.name}: at most {self.memory.peak / 2**20:,.1f} MiB in tensors, in "
            f"{self.memory.peak_at}",
            f"the host waited {self.waits.total():,} times; {self.copies_without_wait:,} copies needed no wait",
            *(f"{count:7,}  {where:36} {why}" for (why, where), count in self.waits.most_common()),
        ]


def _line() -> str:
    """The line of qlora_dpo that runs now, the innermost of them."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among `values`, and in lists among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


@functools.cache
def _draws(func: Any) -> bool:
    """True for an operation that draws from a random generator."""
    return torch.Tag.nondeterministic_seeded in func.tags


INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


def _insist_on_one_device(func: Any, args: Sequence[Any], inputs: Sequence[Tensor], places: Sequence[Any]) -> None:
    """Raise for tensors on the CPU among those on the GPU; single numbers may be there, and so may indices."""
    packet = func._overloadpacket
    if packet in (aten.copy_, aten._to_copy, aten.lift_fresh):
        return
    if packet in INDEXING:
        if places[0] == "cpu":
            raise MixedDevicesError(
                f"indices should be either on cpu or on the same device as the indexed tensor (cpu), in {func}"
            )
        if packet is aten.index:
            return
        inputs, places = inputs[-1:], places[-1:]  # what is put there
    if any(place == "cpu" and each.dim() > 0 for each, place in zip(inputs, places, strict=True)):
        raise MixedDevicesError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"{func} has shapes {[tuple(each.shape) for each in inputs]} on {list(places)}"
        )


ALWAYS_WAIT = (
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount),
    *(aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive),
)
"""What gives a number to the host, or a tensor whose shape the host must know first."""
MAY_WAIT = {*ALWAYS_WAIT, *INDEXING, aten.repeat_interleave, aten.segment_reduce}


def _waits(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], memory: Memory) -> Iterator[str]:
    """Why the host waits in an operation of the GPU, once for each time."""
    packet = func._overloadpacket
    if packet in ALWAYS_WAIT:
        yield str(packet)
    elif packet is aten.repeat_interleave and kwargs.get("output_size") is None:
        yield "repeat_interleave without output_size"
    elif packet is aten.segment_reduce and not kwargs.get("unsafe"):
        yield from ("segment_reduce looks at the least length", "segment_reduce looks at the sum of all lengths")
    elif packet in INDEXING:
        indices = [each for each in args[1] if each is not None]
        yield from ("index on the CPU" for each in indices if memory.place_of(each) == "cpu")
        masks = [each for each in indices if each.dtype in (torch.bool, torch.uint8)]
        if masks and not _is_a_fill(packet, args, memory):
            yield "index by a mask"


def _is_a_fill(packet: Any, args: Sequence[Any], memory: Memory) -> bool:
    """True for `tensor[mask] = number`, which torch does by masked_fill_."""
    return packet is not aten.index and args[2].numel() == 1 and memory.place_of(args[2]) != "cuda"


class _Operations(TorchDispatchMode):
    """Below autograd: every operation, of the forward and of the backward pass."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard against it takes as long as a small operation

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self.gpu.run(func, args, kwargs or {})


IN_16_BITS = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.prelu, F.scaled_dot_product_attention),
    *(torch.matmul, torch.mm, torch.mv, torch.bmm, torch.addmm, torch.addmv, torch.addbmm, torch.baddbmm),
    *(torch.einsum, torch.chain_matmul, torch.linalg.multi_dot),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.mv, Tensor.bmm, Tensor.addmm),
    *(Tensor.addmv, Tensor.addbmm, Tensor.baddbmm),
}
"""What CUDA's autocast computes in its own dtype (torch/amp, "CUDA ops that can autocast to float16")."""
IN_32_BITS = {
    *(torch.exp, torch.expm1, torch.log, torch.log1p, torch.log2, torch.log10, torch.pow, torch.rsqrt),
    *(torch.reciprocal, torch.sum, torch.prod, torch.cumsum, torch.cumprod, torch.norm, torch.logsumexp),
    *(torch.softmax, torch.log_softmax, torch.linalg.vector_norm, torch.sinh, torch.cosh, torch.tan, torch.acos),
    *(F.softmax, F.log_softmax, F.softmin, F.layer_norm, F.group_norm, F.softplus),
    *(F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.kl_div, F.cosine_similarity),
    *(Tensor.exp, Tensor.expm1, Tensor.log, Tensor.log1p, Tensor.pow, Tensor.__pow__, Tensor.rsqrt),
    *(Tensor.reciprocal, Tensor.sum, Tensor.prod, Tensor.cumsum, Tensor.norm, Tensor.logsumexp),
    *(Tensor.softmax, Tensor.log_softmax),
}
"""What CUDA's autocast computes in float32."""


class _Copy(torch.autograd.Function):
    """A copy on the other device, whose gradient goes back to the tensor's own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, own: torch.device, dtype: torch.dtype, layout: dict[str, Any]) -> Tensor:
        ctx.own = own, tensor.dtype
        return tensor.to(HERE, dtype, copy=True, **layout)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient.to(*ctx.own), None, None, None


class _Functions(TorchFunctionMode):
    """Above autograd: where tensors say they are, how they are moved and made, and what autocast makes of them."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu
        self.own: dict[Any, Callable[..., Any]] = {
            Tensor.device.__get__: self._device,
            vars(torch._C.TensorBase)["is_cuda"].__get__: self._is_cuda,
            vars(torch._C.TensorBase)["is_cpu"].__get__: lambda tensor: tensor.is_cpu and not self._is_cuda(tensor),
            Tensor.get_device: lambda tensor: 0 if self._is_cuda(tensor) else tensor.get_device(),
            Tensor.to: self._to,
            Tensor.cpu: lambda tensor, **how: self._moved(tensor, HERE, None, **how),
            Tensor.cuda: lambda tensor, device=None, **how: self._moved(tensor, GPU, None, **how),
            Tensor.pin_memory: self._pin_memory,
            Tensor.is_pinned: lambda tensor, device=None: self.gpu.memory.is_pinned(tensor),
            Tensor.numpy: self._numpy,
            Tensor.tolist: self._tolist,
            Tensor.new_tensor: self._new_tensor,
            Tensor.__deepcopy__: self._deepcopy,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if (own := self.own.get(func)) is not None:
            return own(*args, **kwargs)
        if "device" in kwargs or "pin_memory" in kwargs:
            return self._made(func, args, kwargs)
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = self._autocast(func, args, kwargs)
        found = func(*args, **kwargs)
        # what is made of numbers, by `torch.zeros` and its like, is on the CPU
        if isinstance(found, Tensor) and found.device == HERE and not _tensors(args):
            self.gpu.memory.put(found, self.gpu.memory.place_of(found) or "cpu")
        return found

    def _is_cuda(self, tensor: Tensor) -> bool:
        return self.gpu.memory.place_of(tensor) == "cuda"

    def _device(self, tensor: Tensor) -> torch.device:
        return GPU if self._is_cuda(tensor) else tensor.device

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to` in all its forms: a tensor to be like, a dtype, a device, or both, and then how."""
        like = args[0] if args and isinstance(args[0], Tensor) else kwargs.pop("other", None)
        if like is not None:
            args = (GPU if self._is_cuda(like) else like.device, like.dtype, *args[1:])
        names = ("dtype",) if args and isinstance(args[0], torch.dtype) else ("device", "dtype")
        given = dict(zip((*names, "non_blocking", "copy"), args, strict=False)) | kwargs
        device, dtype = given.pop("device", None), given.pop("dtype", None)
        return self._moved(tensor, _as_device(device), dtype, **given)

    def _moved(
        self,
        tensor: Tensor,
        device: torch.device | None,
        dtype: torch.dtype | None,
        *,
        non_blocking: bool = False,
        copy: bool = False,
        **layout: Any,
    ) -> Tensor:
        """A tensor on `device` and in `dtype`, which is itself if it is both already; None for as it is."""
        here = self._device(tensor)
        device, dtype = device or here, dtype or tensor.dtype
        if device.type == here.type or {device.type, here.type} != {"cpu", "cuda"}:
            return tensor.to(device if device.type != "cuda" else HERE, dtype, copy=copy, **layout)
        with self.gpu.making("cuda" if device.type == "cuda" else "cpu"):
            found: Tensor = _Copy.apply(tensor, here, dtype, layout)  # type: ignore[no-untyped-call]
        self.gpu.copy_between(tensor, found, non_blocking)
        return found

    def _pin_memory(self, tensor: Tensor, device: Any = None) -> Tensor:
        if self._is_cuda(tensor):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        if self.gpu.memory.is_pinned(tensor):
            return tensor
        pinned = tensor.clone()
        self.gpu.memory.put(pinned, "cpu", pinned=True)
        return pinned

    def _numpy(self, tensor: Tensor, *, force: bool = False) -> Any:
        if self._is_cuda(tensor) and not force:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
                "first."
            )
        return self._on_the_host(tensor).numpy(force=force)

    def _tolist(self, tensor: Tensor) -> Any:
        return self._on_the_host(tensor).tolist()

    def _on_the_host(self, tensor: Tensor) -> Tensor:
        """A tensor whose numbers are about to be read: a copy, if it is on the GPU."""
        self.gpu.memory.insist_on_arrival([tensor.untyped_storage()._cdata])
        return self._moved(tensor.detach() if self._is_cuda(tensor) else tensor, HERE, None)

    def _new_tensor(self, tensor: Tensor, data: Any, **kwargs: Any) -> Tensor:
        made: Tensor = self._made(
            torch.tensor, (data,), {"dtype": tensor.dtype, "device": self._device(tensor), **kwargs}
        )
        return made

    def _deepcopy(self, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        """A leaf's storage is copied without an operation, so nothing else would note where the copy is."""
        place = self.gpu.memory.place_of(tensor)
        with self.gpu.making(place) if place is not None else nullcontext():
            found: Tensor = tensor.__deepcopy__(memo)
        if place is None:
            return found
        self.gpu.memory.put(found, place)
        return found

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a function makes on a device that it is given, or in page-locked memory."""
        device, pinned = _as_device(kwargs.get("device")), kwargs.pop("pin_memory", False)
        if device is None or device.type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        if func is torch.as_tensor and isinstance(args[0], Tensor):
            return self._moved(args[0], device, kwargs.get("dtype"))
        if device.type == "cuda":
            kwargs["device"] = HERE
            if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.frombuffer):
                self.gpu.wait("numbers of Python's to the GPU")
        with self.gpu.making("cuda" if device.type == "cuda" else "cpu"):
            found = func(*args, **kwargs)
        if isinstance(found, Tensor) and not any(found is each for each in _tensors(args)):
            self.gpu.memory.put(found, "cuda" if device.type == "cuda" else "cpu", pinned=pinned)
        return found

    def _autocast(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments as CUDA's autocast would cast them; that of the CPU leaves them alone."""
        if func in IN_16_BITS:
            dtype = torch.get_autocast_dtype("cuda")
        elif func in IN_32_BITS and kwargs.get("dtype") is None:
            dtype = torch.float32
        else:
            return args, kwargs

        def cast(value: Any) -> Any:
            if isinstance(value, Tensor):
                floats = value.dtype in (torch.float16, torch.bfloat16, torch.float32)
                return value.to(dtype) if floats and value.dtype != dtype and self._is_cuda(value) else value
            return type(value)(map(cast, value)) if type(value) in (list, tuple) else value

        return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def _as_device(value: Any) -> torch.device | None:
    """What torch takes for a device; a number is that of a GPU."""
    if value is None or isinstance(value, torch.device):
        return value
    return torch.device("cuda", value) if isinstance(value, int) else torch.device(value)


def _torch_cuda(gpu: PretendedGPU) -> dict[str, Any]:
    """What `torch.cuda` says and does, by name."""
    card, memory, generator = gpu.card, gpu.memory, gpu.generator
    properties = SimpleNamespace(
        name=card.name,
        major=card.capability[0],
        minor=card.capability[1],
        total_memory=card.total_bytes,
        multi_processor_count=gpu.multiprocessors,
    )
    return {
        "_initialized": True,  # checkpoints of activations keep the GPU's generator only if it is
        "_lazy_init": lambda: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or card.capability >= (8, 0),
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: card.name,
        "get_device_capability": lambda device=None: card.capability,
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (card.total_bytes - memory.now, card.total_bytes),
        "memory_allocated": lambda device=None: memory.now,
        "memory_reserved": lambda device=None: memory.now,
        "max_memory_allocated": lambda device=None: memory.peak,
        "max_memory_reserved": lambda device=None: memory.peak,
        "reset_peak_memory_stats": lambda device=None: memory.reset_peak(),
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: gpu.wait("torch.cuda.synchronize"),
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
        "get_rng_state": lambda device=None: generator.state(),
        "get_rng_state_all": lambda: [generator.state()],
        "set_rng_state": lambda state, device=None: generator.set_state(state),
        "set_rng_state_all": lambda states: generator.set_state(*states),
    }


def _forget_the_device() -> None:
    """Let libraries that keep what a process runs on look anew."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    for name, each in vars(transformers.utils.import_utils).items():
        if name.startswith(("is_torch", "is_cuda", "get_current_accelerator")) and hasattr(each, "cache_clear"):
            each.cache_clear()


@contextmanager
def pretended_gpu(card: str = "t4", *, fused: bool = True) -> Iterator[PretendedGPU]:
    """Inside, torch finds one GPU, a `card` of `CARDS`; without `fused`, bitsandbytes dequantizes for every product.

    Models must be loaded inside. Tensors that are on the GPU mean nothing afterwards.
    """
    gpu = PretendedGPU(GPU_SPECS[card], MULTIPROCESSORS[card], fused=fused)
    group = torch._C._group_tensors_by_device_and_dtype
    engine, thread = vars(torch.autograd)["_engine_run_backward"], threading.Thread.run

    def backward(*args: Any, **kwargs: Any) -> Any:
        # torch switches a mode off while it handles `Tensor.backward`, within which autograd's functions in Python run
        with _Functions(gpu):
            return engine(*args, **kwargs)

    def run(started: threading.Thread) -> None:
        with _Operations(gpu), _Functions(gpu):  # modes are those of a thread
            thread(started)

    def grouped(tensors: Any, with_indices: bool = False) -> dict[tuple[torch.device, torch.dtype], Any]:
        # optimizers and the clipping of gradients group in C++, which knows where tensors really are
        found = group(tensors, with_indices)
        on_gpu = all(gpu.memory.place_of(each) == "cuda" for each in tensors[0])
        return {(GPU if on_gpu else place, dtype): each for (place, dtype), each in found.items()}

    with ExitStack() as stack:
        for name, value in _torch_cuda(gpu).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value, create=name.startswith("_")))
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", backward))
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run))
        # transformers would read weights in threads that several models share
        stack.enter_context(mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))
        # whether a recomputed tensor is on its device is asked in hooks, some of which run while the mode is off
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        stack.enter_context(mock.patch.dict(checks, default=lambda tensor: (tensor.shape, tensor.dtype)))
        _forget_the_device()
        stack.callback(_forget_the_device)
        stack.enter_context(_Operations(gpu))
        stack.enter_context(_Functions(gpu))
        yield gpu


def main() -> int:
    """Run `qlora-dpo` with the arguments after `--` on a pretended card."""
    parser = argparse.ArgumentParser(description="Run a command of qlora-dpo on a GPU that is pretended.")
    parser.add_argument("--card", choices=MULTIPROCESSORS, default="t4")
    parser.add_argument("--no-fused", action="store_true", help="let bitsandbytes dequantize for every product")
    parser.add_argument("command", nargs="+", help="what follows qlora-dpo, after --")
    asked = parser.parse_args()
    from qlora_dpo.cli import main as qlora_dpo_main

    with pretended_gpu(asked.card, fused=not asked.no_fused) as gpu:
        code = qlora_dpo_main(asked.command)
    print("\n".join(gpu.report()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
