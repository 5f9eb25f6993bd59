"""CUDA devices that are simulated: real CPU kernels, each storage carries the device that it claims to be on, and what
CUDA refuses is refused. No number changes, so a float32 run gives the plain CPU run's figures bit for bit.

`Functions` answers `.device`, `.to`, `.cpu`, `.numpy`, factories with `device=` and the like from the storages' tags.
`Kernels`, below autograd, sees every aten call, backward included, refuses what mixes devices and tags what comes out.
`torch.cuda` is stubbed, and autocast on CUDA is autocast on the CPU.

Allowed, as on CUDA: CPU tensors without dimensions in pointwise operations, a CPU index into a device tensor, copies.
Not simulated: speed, memory, CUDA's own random numbers (`drawn` counts those that a run would take from them) and
kernels (bitsandbytes, NCCL). A storage made inside a Python function of torch that asks for a device itself is the
CPU's; none of those that transformers and savelib call does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import _allowed_determinism_checks_to_fns

aten = torch.ops.aten
CPU = torch.device("cpu")


class DeviceError(RuntimeError):
    """What CUDA would have refused."""


# tags


def as_device(name: Any) -> torch.device:
    """A device with its index: cuda is cuda:0, as long as nobody has set another."""
    device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def claimed(tensor: Tensor) -> torch.device:
    """The device that a tensor claims to be on."""
    with torch._C.DisableTorchFunction():
        device = tensor.device
        if device.type != "cpu":
            return device  # meta
        try:
            return getattr(tensor.untyped_storage(), "claimed", CPU)
        except NotImplementedError:  # inside vmap there is no storage
            return CPU


def claim(tensors: Any, device: torch.device) -> Any:
    """The same tensors, on this device from now on."""
    with torch._C.DisableTorchFunction():
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                tensor.untyped_storage().claimed = device
    return tensors


class Move(torch.autograd.Function):
    """A copy on another device; the gradient goes back to where it came from."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        ctx.came_from = claimed(tensor)
        return claim(tensor.clone(), device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return claim(gradient.clone(), ctx.came_from), None


# functions of torch that ask for or name a device


def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to in all its forms: (device, dtype, ...), (dtype, ...), (other tensor, ...)."""
    names, device = ["dtype", "non_blocking", "copy"], kwargs.pop("device", None)
    if args and isinstance(args[0], Tensor):
        device, args = claimed(args[0]), (args[0].dtype, *args[1:])
    elif args and isinstance(args[0], torch.device | str | int):
        device, args = args[0], args[1:]
    elif args and args[0] is None:
        args = args[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    given = {k: v for k, v in given.items() if v is not None}
    device = claimed(tensor) if device is None else as_device(device)
    if device.type == "meta" or tensor.is_meta:
        return tensor.to(device="cpu" if device.type == "cuda" else device, **given)
    out = tensor.to(**given) if given else tensor
    return out if device == claimed(tensor) else Move.apply(out, device)


def as_tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    if isinstance(data, Tensor):
        return to(data, device, dtype)
    return claim(torch.as_tensor(data, dtype=dtype), CPU if device is None else as_device(device))


def numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if claimed(tensor) != CPU:
        raise DeviceError(f"can't convert {claimed(tensor)} device type tensor to numpy")
    return tensor.numpy(*args, **kwargs)


def set_grad(tensor: Tensor, gradient: Tensor | None) -> None:
    if gradient is not None and claimed(gradient) != claimed(tensor):
        raise DeviceError(f"assigned grad is on {claimed(gradient)}, its tensor on {claimed(tensor)}")
    tensor.grad = gradient


def deep_copy(tensor: Tensor, memo: dict) -> Tensor:
    return claim(tensor.__deepcopy__(memo), claimed(tensor))


def new_tensor(tensor: Tensor, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    return claim(tensor.new_tensor(*args, **kwargs), claimed(tensor) if device is None else as_device(device))


ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: claimed,
    Tensor.is_cuda.__get__: lambda t: claimed(t).type == "cuda",
    Tensor.is_cpu.__get__: lambda t: claimed(t).type == "cpu",
    Tensor.get_device: lambda t: -1 if claimed(t).type == "cpu" else claimed(t).index,
    Tensor.to: to,
    Tensor.cpu: lambda t, *_, **__: to(t, CPU),
    Tensor.cuda: lambda t, device=None, *_, **__: to(t, "cuda" if device is None else device),
    Tensor.numpy: numpy,
    Tensor.__array__: numpy,
    Tensor.grad.__set__: set_grad,
    Tensor.__deepcopy__: deep_copy,
    Tensor.new_tensor: new_tensor,
    torch.as_tensor: as_tensor,
}
RANDOM = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like, torch.randint_like}


class Functions(TorchFunctionMode):
    def __init__(self, kernels: Kernels):
        super().__init__()
        self.kernels = kernels

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in ANSWERS:
            return ANSWERS[func](*args, **kwargs)
        if func is Tensor.backward:
            return self.backward(*args, **kwargs)
        if "pin_memory" in kwargs:
            kwargs = kwargs | {"pin_memory": False}
        if kwargs.get("device") is None or torch.device(kwargs["device"]).type == "meta":
            return func(*args, **kwargs)
        device = as_device(kwargs["device"])
        if device.type == "cuda" and kwargs.get("generator") is not None:
            raise DeviceError(f"Expected a 'cuda' device type for generator but found 'cpu': {func.__name__}")
        self.kernels.drawn += device.type == "cuda" and func in RANDOM
        with self.kernels.anywhere():  # `x.new_zeros(3, device=...)` may be asked of any x
            return claim(func(*args, **kwargs | {"device": CPU}), device)

    def backward(
        self, loss: Tensor, gradient: Tensor | None = None, retain_graph: bool = False, create_graph: bool = False,
        inputs: None = None,
    ) -> None:  # fmt: skip
        """As Tensor.backward, which would run what is recomputed in it without this mode."""
        gradient = torch.ones_like(loss) if gradient is None else gradient
        with self:
            torch.autograd.graph._engine_run_backward(
                (loss,), (gradient,), bool(retain_graph), create_graph, (), allow_unreachable=True, accumulate_grad=True
            )


# kernels

COPIES = {aten.copy_.default, aten._copy_from.default, aten._copy_from_and_resize.default}
INDEXED = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor, aten._unsafe_index_put.default,
}  # fmt: skip
SCALARS_TOO = {  # pointwise, though not marked so
    aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill.Tensor, aten.fill_.Tensor,
}  # fmt: skip


class Kernels(TorchDispatchMode):
    """calls: kernels that ran on a device; drawn: how often a device's own random numbers were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn, self.calls, self.checking = 0, 0, True

    @contextmanager
    def anywhere(self) -> Iterator[None]:
        before, self.checking = self.checking, False
        try:
            yield
        finally:
            self.checking = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        device = self.common(func, args, kwargs) if self.checking and func not in COPIES else None
        out = func(*args, **kwargs)
        if device is not None and device.type == "cuda":
            claim(out, device)
            self.calls += 1
            # attention draws for its dropout alone
            random = torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func.name()
            self.drawn += random
        return out

    def common(self, func: Any, args: tuple, kwargs: dict) -> torch.device | None:
        """The one device of a kernel's tensors. Raises DeviceError where CUDA would refuse them."""
        if func in INDEXED:
            return self.indexed(func, *args)
        scalars = torch.Tag.pointwise in func.tags or func in SCALARS_TOO
        given = [(t, claimed(t)) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for i, t in enumerate(args) if isinstance(t, Tensor) and self.writes(func, i)]
        devices = {d for _, d in given}
        if len(devices) > 1 and scalars:
            devices = {d for t, d in given if d != CPU or t.dim() or any(t is w for w in written)}
        if len(devices - {torch.device("meta")}) > 1:
            raise DeviceError(f"{func}: expected all tensors on one device, found {sorted(map(str, devices))}")
        return next(iter(devices), None)

    @staticmethod
    def writes(func: Any, i: int) -> bool:
        info = func._schema.arguments[i].alias_info if i < len(func._schema.arguments) else None
        return info is not None and info.is_write

    @staticmethod
    def indexed(func: Any, tensor: Tensor, indices: list, values: Tensor | None = None, *_: Any) -> torch.device:
        device = claimed(tensor)
        for index in indices:
            if index is not None and claimed(index) not in (CPU, device):
                raise DeviceError(f"{func}: indices should be on the CPU or on {device}, found {claimed(index)}")
        if values is not None and claimed(values) != device and (values.dim() or claimed(values) != CPU):
            raise DeviceError(f"{func}: expected values on {device}, found {claimed(values)}")
        return device


# torch.cuda


class Autocast(torch.autocast):
    """Autocast on CUDA, done by the CPU's."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def stubs(count: int) -> dict[str, Any]:
    """What stands in for the functions of torch.cuda."""
    now = [0]
    properties = SimpleNamespace(name="simulated", total_memory=80 * 2**30, major=9, minor=0)
    return dict(
        is_available=lambda: True, device_count=lambda: count, current_device=lambda: now[0],
        set_device=lambda d: now.__setitem__(0, as_device(d).index), synchronize=lambda *_: None,
        is_bf16_supported=lambda *_, **__: True, get_device_name=lambda *_: "simulated",
        get_device_properties=lambda *_: properties, get_device_capability=lambda *_: (9, 0),
        reset_peak_memory_stats=lambda *_: None, max_memory_allocated=lambda *_: 2**30,
        get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8), set_rng_state=lambda *_: None,
        manual_seed_all=lambda _: None, empty_cache=lambda: None,
    )  # fmt: skip


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda device_type=None: function("cpu" if device_type in (None, "cuda") else device_type)


def _groups(lists: list, with_indices: bool = False) -> dict:
    """torch's groups of tensors of one device and type; savelib never has two devices in a list."""
    found = GROUPS_OF_TORCH(lists, with_indices)
    for (_, _), ((first, *_), _) in found.items():
        if len({claimed(t) for t in first}) > 1:
            raise DeviceError("tensors of one optimizer on two devices")
    return {(claimed(group[0][0][0]), dtype): group for (_, dtype), group in found.items()}


def _seen_by_checkpointing(tensor: Tensor) -> dict[str, Any]:
    """What must be the same when a tensor is computed again."""
    return {"shape": tensor.shape, "dtype": tensor.dtype, "device": claimed(tensor)}


GROUPS_OF_TORCH = torch._C._group_tensors_by_device_and_dtype


@contextmanager
def simulated_cuda(count: int = 1) -> Iterator[Kernels]:
    """`count` simulated devices for what runs inside; gives the mode that has seen every kernel."""
    from accelerate.state import AcceleratorState, PartialState  # slow to import

    kernels, cudnn = Kernels(), torch.backends.cuda.cudnn_sdp_enabled()
    patches = [mock.patch.object(torch.cuda, name, stub) for name, stub in stubs(count).items()]
    patches += [mock.patch.object(torch, "autocast", Autocast), mock.patch.object(torch.amp, "autocast", Autocast)]
    patches.append(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", _groups))
    patches.append(mock.patch.dict(_allowed_determinism_checks_to_fns, default=_seen_by_checkpointing))
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        patches.append(mock.patch.object(torch, name, _on_cpu(getattr(torch, name))))
    for patch in patches:
        patch.start()
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        with kernels, Functions(kernels):
            yield kernels
    finally:
        for patch in reversed(patches):
            patch.stop()
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
