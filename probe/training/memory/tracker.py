"""One training step under torch's own memory tracker, without memory, or for real.

The tracker (torch.distributed._tools.mem_tracker.MemTracker) counts every storage from its making to its end.
Under FakeTensorMode tensors have sizes and no data, so a step of a model of any size can be followed; what is
counted is what tensors take, not what an allocator reserves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from probe.errors import ProbeError, UsageError
from probe.training.memory.plan import DTYPES, FineTuningPlan

TRACKED = ("adamw", "adamw-single", "adamw-foreach", "sgd", "sgd-momentum", "adafactor", "lion", "muon")
NEEDS_NUMBERS = ("adafactor",)
"""Optimizers that look into their tensors, which have no numbers without memory."""


def tracked_step(name: str, plan: FineTuningPlan) -> dict[str, Any]:
    """Peak bytes of one steady training step (optimizer state exists), without its memory, by kind of tensor.

    Raises UsageError for what the tracker cannot follow (several GPUs, optimizers that torch does not have).
    """
    _check(plan)
    if plan.optimizer in NEEDS_NUMBERS:
        raise UsageError(
            f"{plan.optimizer} looks at numbers, which a step without memory has not: --measure real"
        )
    with _explained(name, "torch cannot follow this step without memory", _ELSEWHERE):
        try:
            peak, marks = _followed(name, plan, masks=False)
        except ProbeError:
            raise
        except Exception:  # a family that reads the mask, which a causal batch does not need
            peak, marks = _followed(name, plan, masks=True)
    totals: dict[str, int] = {}
    for kinds in peak.values():
        for kind, size in kinds.items():
            label = getattr(kind, "value", kind)
            totals[label] = totals.get(label, 0) + int(size)
    total = totals.pop("Total")
    return {"how": "tracked, FakeTensorMode", "peak_bytes": total, "by_kind": totals, "peak_until": marks}


def _followed(name: str, plan: FineTuningPlan, masks: bool) -> tuple[Any, dict[str, int]]:
    """The tracker's snapshot of the peak, by device and kind, and the peak until the end of each phase."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    marks: dict[str, int] = {}
    with FakeTensorMode():
        model, optimizer, batch, prepare = _setting(name, plan, masks)
        prepare()
        tracker = _tracker()
        tracker.track_external(model, *optimizer.parts, *batch.values())

        def mark(phase: str) -> None:
            snapshot = tracker.get_tracker_snapshot("peak")
            marks[phase] = max((int(kinds["Total"]) for kinds in snapshot.values()), default=0)

        with tracker:
            _step(model, optimizer, batch, plan, mark, tracker.reset_mod_stats)
        return tracker.get_tracker_snapshot("peak"), marks


_ELSEWHERE = "another --precision, --attention eager, or --measure real"


@contextmanager
def _explained(name: str, what: str, remedy: str) -> Iterator[None]:
    """Whatever a family's own code raises within a step, as one sentence. Raises UsageError."""
    try:
        yield
    except ProbeError:
        raise
    except Exception as error:
        from probe.training.outline import first_line

        raise UsageError(f"{name}: {what} ({first_line(error)}): {remedy}") from error


def real_step(name: str, plan: FineTuningPlan, device: str = "cpu") -> dict[str, Any]:
    """Peak bytes of one training step that is really run: by the tracker on a CPU, by the allocator on CUDA."""
    _check(plan)
    with _explained(name, "this step cannot be run", "another --precision, --attention or --device"):
        return _run(name, plan, device)


def _run(name: str, plan: FineTuningPlan, device: str) -> dict[str, Any]:
    import torch

    if device.startswith("cuda"):
        with torch.device(device):
            model, optimizer, batch, prepare = _setting(name, plan)
        prepare()
        torch.cuda.reset_peak_memory_stats(device)
        _step(model, optimizer, batch, plan, lambda phase: None, lambda: None)
        torch.cuda.synchronize(device)
        return {
            "how": f"max_memory_allocated on {device}",
            "peak_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    model, optimizer, batch, prepare = _setting(name, plan)
    prepare()
    tracker = _tracker()
    tracker.track_external(model, *optimizer.parts, *batch.values())
    with tracker:
        _step(model, optimizer, batch, plan, lambda phase: None, tracker.reset_mod_stats)
    peak = tracker.get_tracker_snapshot("peak")
    total = sum(int(kinds["Total"]) for kinds in peak.values())
    return {"how": "tracked, run on the CPU", "peak_bytes": total}


def _tracker() -> Any:
    """torch's tracker, which fails on modules with frozen weights because it hooks all of their gradients."""
    from torch.distributed._tools.mem_tracker import MemTracker

    class Tracker(MemTracker):
        def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
            trained = all(parameter.requires_grad for parameter in module.parameters())
            return super()._track_module_params_and_buffers(module, install_grad_hooks and trained)

    return Tracker()


def _check(plan: FineTuningPlan) -> None:
    if plan.n_gpus > 1:
        raise UsageError("--measure follows one GPU; leave out --gpus or --measure")
    if plan.optimizer not in TRACKED:
        raise UsageError(f"--measure cannot follow {plan.optimizer}; one of {', '.join(TRACKED)}")
    kernels = {
        "--compile": plan.compile,
        "--loss fused": plan.loss == "fused",
        "--offload-activations": plan.offload,
        "--repeat-kv": plan.repeat_kv,
    }
    if other := [option for option, given in kernels.items() if given]:
        raise UsageError(
            f"--measure runs transformers' own layers, without {', '.join(other)}: leave one out"
        )


def _setting(
    name: str, plan: FineTuningPlan, masks: bool = False
) -> tuple[Any, Any, dict[str, Any], Callable[[], None]]:
    import torch

    from probe.training.outline import add_adapters, training_model

    model = training_model(
        name,
        dtype=DTYPES.get(plan.precision, plan.precision),
        attention="eager" if plan.attention == "eager" else "sdpa",
        checkpointing=plan.checkpointing,
        length=plan.length,
        masks=masks,
    )
    if plan.method != "full":
        four_bit, double = plan.method == "qlora", plan.double_quantization
        add_adapters(model, plan.rank, plan.targets, four_bit=four_bit, double=double, size=plan.adapter_size)
    optimizer = _Optimizer(model, plan)
    ids = torch.zeros(plan.batch, plan.length, dtype=torch.long)
    return model, optimizer, {"input_ids": ids, "labels": ids.clone()}, optimizer.prepare


def _step(
    model: Any, optimizer: Any, batch: dict, plan: FineTuningPlan, mark: Callable, again: Callable
) -> None:
    import torch

    for index in range(min(plan.accumulation, 2)):
        if index:
            again()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=plan.precision == "autocast"):
            loss = _chunked_loss(model, **batch) if plan.loss == "chunked" else model(**batch).loss
        mark("forward")
        loss.backward()
        del loss
        mark("backward")
    if not plan.optimizer_in_backward:
        optimizer.step()
    mark("step")


def _chunked_loss(model: Any, input_ids: Any, labels: Any) -> Any:
    """Cross entropy of the head over eighths of the text (torchtune.modules.loss.CEWithChunkedOutputLoss)."""
    import torch

    from probe.training.memory.loss import CHUNKS

    hidden = model.base_model(input_ids=input_ids).last_hidden_state
    head = model.get_output_embeddings()  # as a function: the tracker follows one call of a module
    bias = getattr(head, "bias", None)
    logits = [torch.nn.functional.linear(part, head.weight, bias) for part in hidden.chunk(CHUNKS, dim=1)]
    del hidden
    wanted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).chunk(CHUNKS, dim=1)
    losses = [
        torch.nn.functional.cross_entropy(part.flatten(0, 1).float(), right.flatten(), reduction="sum")
        for part, right in zip(logits, wanted, strict=True)
    ]
    return torch.stack(losses).sum()


class _Optimizer:
    """torch's optimizers, and float32 masters of 16-bit weights, each stepped on its own as ZeRO does."""

    def __init__(self, model: Any, plan: FineTuningPlan):
        import torch

        trained = [p for p in model.parameters() if p.requires_grad]
        self._masters: list[tuple[Any, Any, Any]] = []
        if plan.optimizer_in_backward and (plan.precision != "mixed" or plan.method != "full"):
            self._inner = [o for parameter in trained for o in _split(plan.optimizer, [parameter])]
            self.parts = []
        elif plan.precision == "mixed" and plan.method == "full":
            for parameter in trained:
                master = torch.nn.Parameter(parameter.detach().float())
                self._masters.append((parameter, master, _split(plan.optimizer, [master])[0]))
            self.parts: list[Any] = [m for _, m, _ in self._masters]
            self._inner = []
        else:
            self._inner = _split(plan.optimizer, trained)
            self.parts = []
        self._trained, self._in_backward = trained, plan.optimizer_in_backward

    def prepare(self) -> None:
        """One step on zero gradients, so that the optimizer's state exists."""
        import torch

        for parameter in self._trained:
            parameter.grad = torch.zeros_like(parameter)
        self.step()
        optimizers = [o for *_, o in self._masters] or self._inner
        self.parts += optimizers
        if self._in_backward:
            for index, parameter in enumerate(self._trained):
                parameter.register_post_accumulate_grad_hook(lambda _, at=index: self._step_alone(at))

    def _step_alone(self, index: int) -> None:
        if self._masters:
            self._step_master(*self._masters[index])
        else:
            self._inner[index].step()
        self._trained[index].grad = None

    def step(self) -> None:
        for optimizer in self._inner:
            optimizer.step()
        for entry in self._masters:
            self._step_master(*entry)
        for parameter in self._trained:
            parameter.grad = None

    def _step_master(self, parameter: Any, master: Any, optimizer: Any) -> None:
        master.grad = parameter.grad.float()
        optimizer.step()
        master.grad = None
        parameter.data.copy_(master.data)


def _split(kind: str, parameters: list) -> list:
    if kind != "muon":
        return [_make(kind, parameters)]
    matrices = [p for p in parameters if p.ndim == 2 and max(p.shape) < 32_000]
    rest = [p for p in parameters if not any(p is q for q in matrices)]
    groups = (("muon", matrices), ("adamw", rest))
    return [_make(name, group) for name, group in groups if group]


def _make(kind: str, parameters: list) -> Any:
    import torch

    if kind == "adafactor":
        return torch.optim.Adafactor(parameters, foreach=False)
    if kind == "lion":
        return _lion(parameters)
    if kind == "muon":
        return torch.optim.Muon(parameters)
    if kind.startswith("sgd"):
        return torch.optim.SGD(
            parameters, lr=1e-3, momentum=0.9 if kind == "sgd-momentum" else 0.0, foreach=False
        )
    if kind == "adamw":
        return torch.optim.AdamW(parameters, fused=True)
    return torch.optim.AdamW(parameters, foreach=kind == "adamw-foreach")


def _lion(parameters: list) -> Any:
    """Lion (arXiv:2302.06675, program 1), which torch does not have: one moment, steps by its sign."""
    import torch

    class Lion(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    if not state:
                        state["exp_avg"] = torch.zeros_like(parameter)
                    moment, gradient = state["exp_avg"], parameter.grad
                    update = moment.clone().mul_(0.9).add(gradient, alpha=0.1).sign_()
                    parameter.add_(update, alpha=-1e-4)
                    moment.mul_(0.99).add_(gradient, alpha=0.01)

    return Lion(parameters, {})
