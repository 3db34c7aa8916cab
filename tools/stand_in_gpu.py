"""A GPU that computes on the CPU: what can be tried of CUDA on a machine without one.

A tensor that is sent to "cuda" becomes an `OnGPU`: its numbers lie in ordinary memory, and every
operation on it is the CPU's. It is true here that

- `torch.cuda` counts as many devices as were asked for, less those CUDA_VISIBLE_DEVICES hides, and
  names their memory;
- operations that mix the devices fail, as do `numpy` of a GPU's tensor and a generator of the
  other device;
- under autocast the products are computed in bf16, by the CPU's lists of operations.

It does not show memory that runs out, speed, CUDA's kernels and lists, streams, or NCCL: processes
exchange by gloo. `start("3x80")` acts on this process; SITE, on the path of processes
that are started later, does so there (rehearsal.py), and each leaves a line in the file of LOG.

    python -m pytest tests/unit/test_stand_in_gpu.py
"""

import atexit
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPUS = "MIMDET_STAND_IN_GPUS"
"""Environment variable: how many and how large, such as 3x80."""
LOG = "MIMDET_STAND_IN_LOG"
"""Environment variable: a file that gets a line of json when such a process ends."""
SITE = f"""\
import os, sys
words = sys.orig_argv
if os.environ.get("{GPUS}") and any(w.startswith(("mimdet", "ipykernel_launcher")) for w in words):
    from tools.stand_in_gpu import start
    start(os.environ["{GPUS}"])
"""
"""Text of a sitecustomize.py: kernels and the kit's processes start with the stand-in."""
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "conv", "_scaled_dot_product")
MAKERS = "empty zeros ones full arange linspace eye rand randn randint randperm tensor as_tensor"
_seen: Counter[str] = Counter()


class OnGPU(Tensor):
    """A tensor that counts as CUDA's; `held` is the one that is computed with."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGPU":
        return Tensor._make_subclass(cls, inner, False)

    def __init__(self, inner: Tensor) -> None:
        self.held = inner

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.held!r} on {CUDA}"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    __array__ = numpy  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:  # files are read with map_location="cpu"
        return self.held.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made: Tensor = OnGPU(self.held.clone()).requires_grad_(self.requires_grad)
        return torch.nn.Parameter(made) if isinstance(self, torch.nn.Parameter) else made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What is called with such a tensor makes others of its own device."""
        if torch.device((kwargs or {}).get("device") or CUDA).type == "cpu":
            args, kwargs = tree_map_only(OnGPU, lambda t: t.detach().held, (args, kwargs))
            return func(*args, **kwargs)
        with _MakesOnGPU():
            return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The operation on the CPU; its results are the GPU's."""
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        strict = [] if name == "copy_" else tree_leaves((args, kwargs))
        if name in INDEXED and isinstance(args[0], OnGPU):
            strict = tree_leaves((args[:1], args[2:]))  # indices may be the CPU's
        if any(isinstance(t, Tensor) and t.dim() and not isinstance(t, OnGPU) for t in strict):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({func})"
            )
        kwargs = kwargs | ({"device": CPU} if "device" in kwargs else {})
        given = tree_leaves((args, kwargs))
        tensors = [value for value in given if isinstance(value, Tensor)]
        for value in given:
            if isinstance(value, torch.Generator) and value.device != CUDA:
                raise RuntimeError(f"Expected a 'cuda' device type for generator ({func})")
        if name.startswith(PRODUCTS):
            _seen[f"products in {str(tensors[0].dtype).removeprefix('torch.')}"] += 1
        arguments = tree_map_only(OnGPU, lambda t: t.held, (args, kwargs))
        results = func(*arguments[0], **arguments[1])
        known: dict[int, Tensor] = {id(t): t for t in tensors}  # of operations in place
        known |= {id(t.held): t for t in tensors if isinstance(t, OnGPU)}
        return tree_map_only(
            Tensor, lambda t: known[id(t)] if id(t) in known else OnGPU(t), results
        )


class _MakesOnGPU(TorchDispatchMode):
    """Inside, tensors that are made of none are the GPU's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(isinstance(value, Tensor) for value in tree_leaves((args, kwargs))):
            return made
        return tree_map_only(Tensor, OnGPU, made)


class _Up(torch.autograd.Function):
    """A CPU's tensor to the GPU; its gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return OnGPU(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient.held


class _Down(torch.autograd.Function):
    """And the other way."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Any:
        return tensor.held.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return OnGPU(gradient)


class Generator(torch.Generator):
    """Of either device: it draws the CPU's numbers."""

    at: torch.device

    def __new__(cls, device: Any = CPU) -> "Generator":
        made = super().__new__(cls, CPU)  # type: ignore[call-arg]
        made.at = torch.device("cuda", 0) if torch.device(device).type == "cuda" else CPU
        return made

    device = property(lambda self: self.at)  # type: ignore[assignment]


def start(gpus: str) -> None:
    """From now on this process has GPUs such as "3x80": three of 80 GB."""
    there(gpus)
    _tensors()
    _exchanges()
    if os.environ.get(LOG):
        atexit.register(report)


def there(gpus: str) -> None:
    """From now on torch.cuda speaks of such GPUs; nothing can be sent to them."""
    count, gigabytes = (int(number) for number in gpus.split("x"))

    def visible() -> int:
        names = os.environ.get("CUDA_VISIBLE_DEVICES")
        return (
            count if names is None else len([n for n in names.split(",") if n and int(n) < count])
        )

    gpu = SimpleNamespace(name="stand-in GPU", total_memory=gigabytes * 10**9, major=9, minor=0)
    says: dict[str, Any] = {
        "is_available": lambda: visible() > 0,
        "device_count": visible,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: gpu,
        "get_device_name": lambda *_: gpu.name,
        "is_bf16_supported": lambda *_, **__: True,
        "max_memory_allocated": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
    }
    silent = "_lazy_init set_device empty_cache synchronize manual_seed manual_seed_all "
    silent += "reset_peak_memory_stats"
    says |= {name: lambda *_, **__: None for name in silent.split()}
    for name, answer in says.items():
        setattr(torch.cuda, name, answer)
    torch.Generator = Generator  # type: ignore[misc]
    for owner in ("_accelerator", "_cuda"):  # an optimizer asks the driver whether it records
        name = f"{owner}_graph_capture_health_check"
        setattr(torch.optim.Optimizer, name, lambda self: None)


def _tensors() -> None:
    """Whatever takes a device takes this one."""
    move = Tensor.to

    def to(self: Tensor, *args: Any, **options: Any) -> Tensor:
        if self.is_meta:
            return move(self, *args, **options)
        if args and isinstance(args[0], Tensor):
            args, options = (args[0].device, args[0].dtype), {}
        copy = options.pop("copy", False)
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **options)
        same = self if dtype is None else move(self, dtype)
        same = same if layout is None else move(same, memory_format=layout)
        if device is not None and device.type == "meta":
            return move(same, device)
        if device is None or device.type == self.device.type:
            return same.clone() if copy and same is self else same
        return (_Up if device.type == "cuda" else _Down).apply(same)  # type: ignore[no-any-return]

    def on_device(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, device: Any = None, **options: Any) -> Tensor:
            draws = options.get("generator")
            if device is None or torch.device(device).type != "cuda":
                return make(*args, **options, **({} if device is None else {"device": device}))
            if draws is not None and draws.device.type != "cuda":
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            wanted = options.pop("requires_grad", False)
            return make(*args, **options).to(device).requires_grad_(wanted)

        return made

    def new_tensor(self: Tensor, data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
            super().__init__(device_type.replace("cuda", "cpu"), *args, **options)

    torch.autocast = Autocast  # type: ignore[misc]
    _device_constructors()  # what `with torch.device("meta")` looks for are the makers themselves
    for name in MAKERS.split():
        setattr(torch, name, on_device(getattr(torch, name)))
    Tensor.to, Tensor.new_tensor = to, new_tensor  # type: ignore[method-assign, assignment]
    Tensor.cpu = lambda self: self.to(CPU)  # type: ignore[method-assign, misc, assignment]
    Tensor.cuda = lambda self, *_: self.to(CUDA)  # type: ignore[method-assign, misc, assignment]
    # A module's `to` keeps its parameters the same objects, as with a GPU.
    torch.__future__.set_swap_module_params_on_conversion(True)


def _exchanges() -> None:
    """Between processes: gloo's, on the numbers themselves."""
    join = dist.init_process_group

    def init(backend: str = "", **options: Any) -> None:
        _seen[f"asked for {backend}"] += 1
        join("gloo", **options)

    def on_numbers(exchange: Callable[..., Any]) -> Callable[..., Any]:
        def exchanged(*args: Any, **options: Any) -> Any:
            _seen["exchanges of a GPU"] += any(isinstance(t, OnGPU) for t in tree_leaves(args))
            return exchange(*tree_map_only(OnGPU, lambda t: t.held, args), **options)

        return exchanged

    dist.init_process_group = init  # type: ignore[assignment]
    for name in ("all_reduce", "all_gather", "broadcast"):
        setattr(dist, name, on_numbers(getattr(dist, name)))


def report() -> None:
    """A line of what this process did on its GPU, once; a kernel may be killed when it ends."""
    atexit.unregister(report)
    words = [word for word in sys.orig_argv if "mimdet" in word or "ipykernel" in word]
    names = ("CUDA_VISIBLE_DEVICES", "RANK")
    line = {"words": words[0], **{name: os.environ.get(name) for name in names}, **_seen}
    with open(os.environ[LOG], "a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")
