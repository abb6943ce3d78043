"""Real passes of a model without storage: shapes, dtypes, devices and memory of 8.4 B parameters on a laptop.

Within `without_storage() as memory` tensors are torch's fake ones. An operator on two devices raises, as on a GPU;
`memory.live` and `memory.peak` are the bytes that real tensors would take. Memory that kernels allocate is not counted.
Inference mode does not work with fake tensors; `torch.no_grad` holds the same memory.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary


@contextmanager
def without_storage() -> Iterator["PeakMemory"]:
    with FakeTensorMode(), PeakMemory() as memory, KnownIntegers():
        yield memory


def place(model: nn.Module, device: str) -> None:
    """Give a model on the meta device fake tensors of another device; call it within `without_storage`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


class PeakMemory(TorchDispatchMode):
    """Follows every storage that an operator makes, real or fake, until it is freed.

    Args:
        held: tensors that exist already.

    Attributes:
        live, peak: bytes, now and at most; `peak` may be reset.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._followed = WeakIdKeyDictionary()
        for tensor in held:
            self._follow(tensor)

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._followed:
            self._followed[storage] = size = storage.nbytes()
            weakref.finalize(storage, self._release, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _release(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            self._follow(tensor)
        return output


class KnownIntegers(TorchDispatchMode):
    """Computes integers and booleans that follow from known ones, so that code can read lengths from fake tensors
    (`int(mask.sum())`, `lengths.tolist()`). Reading a value that depends on weights or features raises a KeyError."""

    def __init__(self):
        super().__init__()
        self._values = WeakIdKeyDictionary()  # fake tensor -> the real one, on the CPU

    def _real(self, leaf):
        if isinstance(leaf, FakeTensor):
            return self._values.get(leaf)
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # the most frequent call
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            with unset_fake_temporarily():
                return self._values[args[0]].item()
        output = func(*args, **kwargs)
        made = _tensors(output)
        known = all(self._real(tensor) is not None for tensor in _tensors((args, kwargs)))
        if made and known and not any(tensor.is_floating_point() for tensor in made):
            with unset_fake_temporarily():
                real_args, real_kwargs = tree_map(self._real, (args, kwargs))
                real = _tensors(func(*real_args, **real_kwargs))
            self._values.update((fake, value) for fake, value in zip(made, real, strict=True))
        else:
            for tensor in made:  # an operator in place
                self._values.pop(tensor, None)
        return output


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
