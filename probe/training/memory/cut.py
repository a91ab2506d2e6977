"""A model cut to some of its layers and run without memory: what it keeps, and what is alive while one runs backward."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from probe.training.outline import add_adapters, layer_stack, training_model


def kept_by_layers(
    name: str,
    choices: list[list[int]],
    batch: int,
    lengths: tuple[int, ...],
    backward: tuple[int, ...],
    *,
    dtype: str,
    attention: str,
    autocast: bool,
    adapters: Any,
    masks: bool = False,
) -> dict[tuple[tuple[int, ...], int], tuple[int, int]]:
    """Bytes that autograd keeps for the backward pass of the model cut to some of its layers, by (layers, length).

    Every storage that autograd saves between input and loss once, weights left out; and, where there are several
    layers, what is alive beside that at most while the last one runs backward, at the lengths `backward`. Under
    FakeTensorMode, so nothing is computed. `choices`: the layers to keep; `adapters`: None, or arguments of add_adapters.
    """
    kept = {}
    with FakeTensorMode():
        model = training_model(
            name,
            dtype=dtype,
            attention=attention,
            checkpointing=False,
            length=max(lengths),
            filled=False,
            masks=masks,
        )
        if adapters:
            add_adapters(model, **adapters)
        path, stack = layer_stack(name, model)
        for chosen in choices:
            with _cut(model, path, stack, chosen):
                for length in lengths:
                    last = stack[chosen[-1]] if len(chosen) > 1 and length in backward else None
                    kept[tuple(chosen), length] = _saved(model, batch, length, autocast, last)
    return kept


@contextmanager
def _cut(model: Any, path: str, stack: Any, chosen: list[int]) -> Iterator[None]:
    """`model` with these layers of its stack alone; lists of the configuration that have an entry a layer follow."""
    parent, _, name = path.rpartition(".")
    holder, config = model.get_submodule(parent), model.config
    listed = {k: v for k, v in vars(config).items() if isinstance(v, list) and len(v) == len(stack)}
    try:
        setattr(holder, name, torch.nn.ModuleList([stack[index] for index in chosen]))
        for key, value in listed.items():
            setattr(config, key, [value[index] for index in chosen])
        yield
    finally:
        setattr(holder, name, stack)
        for key, value in listed.items():
            setattr(config, key, value)


def _saved(model: Any, batch: int, length: int, autocast: bool, layer: Any) -> tuple[int, int]:
    """Bytes that autograd saves in a forward pass, and the scratch of `layer` in the backward pass, if given.

    Weights and autocast's copies of them are left out.
    """
    saved: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    held = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    shapes = {tuple(sorted(p.shape)) for p in model.parameters() if p.ndim == 2} if autocast else set()
    ids = torch.zeros(batch, length, dtype=torch.long)
    alive = None if layer is None else Alive()
    with alive or nullcontext():
        hooks = alive.watch(layer) if alive else []
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            loss = model(input_ids=ids, labels=ids).loss
        size = sum(
            tensor.untyped_storage().nbytes()
            for key, tensor in saved.items()
            if key not in held and tuple(sorted(tensor.shape)) not in shapes
        )
        saved.clear()
        if alive:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            hooks += [parameter.register_post_accumulate_grad_hook(_give_back) for parameter in trained]
            loss.backward()
            for hook in hooks:
                hook.remove()
        del loss
    return size, alive.scratch if alive else 0


def _give_back(parameter: Any) -> None:
    parameter.grad = None


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that are made in it, from their making to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = 0
        """Most bytes that were alive while the watched layer ran backward, above those at its start."""
        self._now = self._peak = self._start = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return results

    def _see(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return

        def end(_: Any) -> None:
            self._now -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, end)
        self._now += size
        self._peak = max(self._peak, self._now)

    def watch(self, layer: Any) -> list[Any]:
        """Follow `layer` from the gradient of its output to that of its input; the hooks that do."""

        def begin(_: Any) -> None:
            self._start = self._peak = self._now

        def end(_: Any) -> None:
            self.scratch = max(self.scratch, self._peak - self._start)

        def before(_: Any, inputs: Any, named: Any) -> None:
            _on_gradient((*inputs, *named.values()), end)

        def after(_: Any, __: Any, output: Any) -> None:
            _on_gradient(output if isinstance(output, tuple) else (output,), begin)

        return [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]


def _on_gradient(values: tuple, call: Any) -> None:
    """Have `call` called when the first of these tensors that has a gradient gets it."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            value.register_hook(call)
            return
