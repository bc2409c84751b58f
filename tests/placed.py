"""Tensors on the CPU that say they are on GPUs, and refuse what GPUs refuse: for device placement.

Inside `placed()` a factory with ``device="cuda:1"`` and ``x.to("cuda:1")`` give a `Placed` tensor,
whose values are real. An operation on tensors of two places raises, as it does on GPUs.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

_aten = torch.ops.aten
_COPIES = (_aten.copy_.default,)  # GPUs copy to and from everywhere


class Placed(torch.Tensor):
    """A tensor that has its values in `inner`, and a place."""

    @staticmethod
    def __new__(cls, inner, place):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            requires_grad=inner.requires_grad,
        )
        self.inner, self.place = inner.detach(), torch.device(place)
        return self

    @property
    def device(self):
        return self.place

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        places = [x.place if isinstance(x, Placed) else None for x in tensors]
        # A single number on the CPU goes with everything.
        known = {p for p, x in zip(places, tensors, strict=True) if p is not None or x.dim() > 0}
        if len(known) > 1 and op not in _COPIES:
            raise RuntimeError(f"{op}: expected tensors on one device, got {known}")
        inner = tree_map(lambda x: x.inner if isinstance(x, Placed) else x, (args, kwargs))
        out = op(*inner[0], **inner[1])
        place = next(p for p in places if p is not None)
        out = tree_map(lambda x: Placed(x, place) if isinstance(x, torch.Tensor) else x, out)
        return return_and_correct_aliasing(op, args, kwargs, out)


class _Move(torch.autograd.Function):
    """A copy to a place (None: to the CPU as it is), whose gradient is copied back."""

    @staticmethod
    def forward(ctx, x, place):
        ctx.came_from = x.place if isinstance(x, Placed) else None
        values = (x.inner if isinstance(x, Placed) else x).detach().clone()
        return values if place is None else Placed(values, place)

    @staticmethod
    def backward(ctx, gradient):
        return _Move.apply(gradient, ctx.came_from), None


class _Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        name = getattr(function, "__name__", "")
        if x is not None and name in ("to", "cpu"):
            return self._to(x, name, args[1:], kwargs)
        if isinstance(x, Placed) and name in ("tolist", "item"):
            return function(x.inner, *args[1:], **kwargs)
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type != "cuda":
            return function(*args, **kwargs)
        wanted = kwargs.pop("requires_grad", False)
        out = function(*args, **kwargs | {"device": "cpu"})
        return _Move.apply(out, device).detach().requires_grad_(wanted)

    @staticmethod
    def _to(x, name, args, kwargs):
        if name == "cpu":
            device, dtype = torch.device("cpu"), None
        elif args and isinstance(args[0], torch.Tensor):
            device, dtype = args[0].device, args[0].dtype
        else:
            device, dtype = torch._C._nn._parse_to(*args, **kwargs)[:2]
        if device is not None and device != x.device:
            x = _Move.apply(x, device if device.type == "cuda" else None)
        with torch._C.DisableTorchFunction():
            return x if dtype is None or dtype == x.dtype else torch.Tensor.type(x, dtype)


def place_model(model, device_map):
    """Put the parts of a model on devices, with the hooks by which accelerate moves inputs."""
    from accelerate import dispatch_model

    for name, device in device_map.items():
        for module in model.get_submodule(name).modules():
            for key, x in module._parameters.items():
                if x is not None:
                    module._parameters[key] = torch.nn.Parameter(Placed(x.detach(), device))
            for key, x in module._buffers.items():
                if x is not None:
                    module._buffers[key] = Placed(x, device)
    # All is where it belongs: this adds hooks.
    return dispatch_model(
        model, device_map, main_device=next(iter(device_map.values())), skip_keys="past_key_values"
    )


@contextlib.contextmanager
def placed():
    """Let torch pretend that there are GPUs."""
    with _Mode():
        yield
