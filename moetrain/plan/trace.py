"""One step of a model on the meta device: what lives when, and what is computed. No weights, no GPU, a second or two.

The model's own forward, its loss and its backward run on tensors without memory, under the rules of `standins.py`
for what only CUDA runs. Every new storage adds to the bytes alive and every freed one takes away, as torch's caching
allocator counts them but for its rounding. Parameters and their gradients are left out: how many bytes of them a rank
holds, and when, follows from the layout (`memory.py`), for which the trace notes when modules are entered and left and
when gradients are ready. One trace thus serves all layouts with the same batch on a rank.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from moetrain.compiled import compile_layers
from moetrain.data.isolation import isolate_documents
from moetrain.families import experts_modules, fsdp_plan
from moetrain.loss import install_loss
from moetrain.parallelize import checkpoint_activations
from moetrain.plan.operators import Work, cost_of, nbytes
from moetrain.plan.spread import Stack, spread_experts
from moetrain.plan.standins import gpu_kernels, use_kernels
from moetrain.tape import recomputed_modules, replaying

KINDS = ("activations", "dispatch", "logits", "workspace")
"""What lives in a step beside parameters and gradients: kept for the backward, rows on their way to and from experts,
the head's chunks, and everything else while it is used."""


RANKS = 8
"""Ranks that a trace stands for where their number changes next to nothing: `nvlink`'s tables, 1 MB a layer."""


class Event(NamedTuple):
    """A point of the step at which what a layout holds may change."""

    what: str
    """`enter` and `leave` (a module's forward), `return` (its backward begins), `gradient` (a parameter's is there)."""
    name: str
    """Of the module or parameter; the model itself is ''."""
    backward: bool
    """Whether the backward has begun."""
    peak: dict[str, int]
    """Bytes by kind at the fullest moment since the event before."""
    now: dict[str, int]
    """Bytes by kind."""


class ExpertLayer(NamedTuple):
    """An experts module, and what comes to it in one pass of a rank."""

    name: str
    num_experts: int
    tokens: int
    hidden: int
    top_k: int
    token_bytes: int
    """Of one number."""


@dataclass(frozen=True)
class Step:
    """What a trace depends on beside the model."""

    batch: int = 1
    """Rows on a rank in one pass."""
    seq_len: int = 4096
    checkpointing: str = "none"
    dispatch: str = "local"
    """`local`, or a key of `moetrain.plan.spread.DISPATCHERS`."""
    rows_over_mean: float = 1.0
    """Rows that this rank's experts get in a call, or have room for, over T*K; 1 for `local`."""
    stacked_over_mean: float | None = None
    """Rows of all layers together over the mean, where a static dispatcher lays them into one buffer; None: each call
    has its own memory."""
    ranks: int = RANKS
    """Of an expert group. `allgather` and `deep_ep` make room for the tokens of every rank."""
    packed: bool = False
    """Documents are kept apart by a mask."""
    loss: str = "auto"
    kernels: str = "auto"
    """`torch` leaves attention to Transformers, `auto` takes this package's."""
    compiled: bool = False
    """Decoder layers run under torch.compile."""
    checkpointed_layers: int | None = None
    """The first ones; None: all."""

    @property
    def recomputed(self) -> str:
        """What is, for people: how, and of how many layers if not of all."""
        return self.checkpointing + (f" {self.checkpointed_layers}" if self.checkpointed_layers else "")

    def share_recomputed(self, layers: int) -> float:
        """Of so many layers, 0 to 1."""
        if self.checkpointing == "none":
            return 0.0
        return min((self.checkpointed_layers or layers) / layers, 1.0)


@dataclass
class StepTrace:
    """One forward and backward of `batch` rows on a rank."""

    step: Step
    events: list[Event] = field(default_factory=list)
    work: dict[tuple[str, str], Work] = field(default_factory=lambda: defaultdict(Work))
    """By phase (`forward`, `backward`) and part (`moetrain.plan.operators.PARTS`)."""
    experts: list[ExpertLayer] = field(default_factory=list)
    loss: str = ""
    """What `install_loss` chose."""
    aside: int = 0
    """Bytes of a layer that are kept while the gradients of its experts' weights are computed beside the next layer."""

    @property
    def tokens(self) -> int:
        return self.step.batch * self.step.seq_len

    def scaled(self, times: int) -> StepTrace:
        """An estimate of the trace with so many times the rows: everything grows with them but the head's chunks."""
        fixed = {"logits": 1}
        grown = [
            event._replace(
                peak={kind: size * fixed.get(kind, times) for kind, size in event.peak.items()},
                now={kind: size * fixed.get(kind, times) for kind, size in event.now.items()},
            )
            for event in self.events
        ]
        work = {key: Work(w.flops * times, w.bytes * times, w.launches) for key, w in self.work.items()}
        experts = [layer._replace(tokens=layer.tokens * times) for layer in self.experts]
        step = replace(self.step, batch=self.step.batch * times)
        return StepTrace(step, grown, work, experts, self.loss, self.aside * times)


def trace_step(build: Callable[[], PreTrainedModel], step: Step) -> StepTrace:
    """Trace one pass.

    Args:
        build: makes the model on the meta device; what it returns is changed.

    Raises:
        ValueError: the model cannot be traced, with the error of its forward.
    """
    model = build().train()
    use_kernels(model, step.kernels)
    if step.packed:
        isolate_documents(model, MAX_DOCUMENTS)
    trace = StepTrace(step)
    recorder = _Recorder(trace)
    trace.loss = install_loss(model, step.loss)
    checkpoint_activations(model, step.checkpointing, step.checkpointed_layers)
    recomputed, spread = recomputed_modules(model), experts_modules(model)
    stacked = [experts for _, experts in spread if experts not in recomputed]
    stack = None if step.stacked_over_mean is None else Stack(step.stacked_over_mean, len(stacked))
    for name, experts in spread:
        _note_experts(trace, name, experts)
        if step.dispatch != "local":
            place = stack if experts in stacked else None
            spread_experts(experts, step.dispatch, step.rows_over_mean, step.ranks, place)
    if step.compiled:
        torch._dynamo.reset()  # what earlier traces have compiled counts against dynamo's limit of variants
        compile_layers(model, mode="on", backend=_PARTITIONED)
    _watch(model, recorder)
    with torch.device("meta"):
        ids = torch.empty(step.batch, step.seq_len, dtype=torch.int64)
        packing = {"position_ids": ids.clone(), "seq_idx": ids.int()} if step.packed else {}
    with gpu_kernels(model), recorder:
        recorder.event("enter", "")
        try:
            loss = model(input_ids=ids, labels=ids, use_cache=False, **packing).loss
        except NotImplementedError as error:
            raise ValueError(
                f"{model.config.model_type} cannot be planned: its forward depends on what is in its tensors "
                f"({str(error).splitlines()[0][:120]}); plan a family of its size"
            ) from error
        recorder.event("leave", "")
        recorder.backward = True
        loss.backward()
        del loss
        recorder.event("end", "")
    return trace


MAX_DOCUMENTS = 64
"""Documents in a packed row; the size of a table of their bounds."""
_PARTITIONED = "aot_eager_decomp_partition"
"""The backend of torch.compile that splits a layer into forward and backward as inductor does, so that the same is kept
between them, and runs both operator by operator."""


def sharded_modules(model: PreTrainedModel) -> dict[str, str]:
    """The modules that FSDP2 shards as units, in module order, and whether they are freed after their forward
    (`free_full_weight`, `keep_full_weight`); experts modules are units where they are spread."""
    plan = fsdp_plan(model)
    named = {
        name: plan.get(replace_layer_number_by_wildcard(name), plan.get(name)) for name, _ in model.named_modules()
    }
    return {name: style for name, style in named.items() if style is not None}


def _note_experts(trace: StepTrace, name: str, experts: Any) -> None:
    num_experts = experts.num_experts

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tokens_TH, ids_TK = args[:2]
        tokens, hidden = tokens_TH.shape
        if name not in {layer.name for layer in trace.experts}:
            trace.experts.append(ExpertLayer(name, num_experts, tokens, hidden, ids_TK.shape[1], tokens_TH.itemsize))

    experts.register_forward_pre_hook(note)


def _watch(model: PreTrainedModel, recorder: _Recorder) -> None:
    """Hooks for the events of a trace."""
    experts = dict(experts_modules(model))
    head = model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    for name in sharded_modules(model) | dict.fromkeys(experts) | {names[head]: ""}:
        module = model.get_submodule(name)
        kind = "dispatch" if name in experts else "logits" if module is head else None
        module.register_forward_pre_hook(recorder.entered(name, kind))
        module.register_forward_hook(recorder.left(name, kind))
    for name, parameter in model.named_parameters():
        recorder.not_counted.add(parameter.untyped_storage()._cdata)
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(recorder.gradient_ready(name))


class _FusedPasses:
    """Passes over memory between two products, as one kernel: it reads what was there and writes what lives on."""

    def __init__(self) -> None:
        self.read: dict[int, int] = {}
        self.written: dict[int, tuple[Any, int]] = {}

    def extend(self, inputs: Any, out: Any) -> None:
        for tensor in tree_iter(inputs):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.written:
                self.read[key] = max(self.read.get(key, 0), nbytes(tensor))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.written[storage._cdata] = (weakref.ref(storage), nbytes(tensor))

    def end(self) -> Work:
        alive = sum(size for reference, size in self.written.values() if reference() is not None)
        moved = Work(0, sum(self.read.values()) + alive, 1 if self.written else 0)
        self.read, self.written = {}, {}
        return moved


class _Recorder(TorchDispatchMode):
    """Sees every operator of a step, keeps the count of bytes alive by kind, and writes the trace."""

    def __init__(self, trace: StepTrace) -> None:
        super().__init__()
        self.trace = trace
        self.live: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self.total = self.peak_total = 0
        self.peak = dict(self.live)
        self.storages: dict[int, tuple[Any, str, int]] = {}
        self.not_counted: set[int] = set()
        self.scope: list[str] = []
        self.tape: list[list[Tensor]] = []
        self.backward = False
        self.fused: _FusedPasses | None = _FusedPasses() if trace.step.compiled else None
        self._stack = contextlib.ExitStack()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled layers run inside this mode, and it sees their operators."""
        return True

    def __enter__(self) -> Any:
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # the one question that models ask of values: do positions show one document in every row?
        # torch 2.11 does not know the second on the meta device
        out = kwargs["out"] if func is torch.ops.aten.addmm.dtype_out else func(*args, **kwargs)
        cost = cost_of(func, args, kwargs, out, "logits" in self.scope)
        self.add(cost.work, (args, kwargs), out)
        self.trace.aside = max(self.trace.aside, cost.aside)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        if func is torch.ops.moetrain.attention.default and args[-1]:
            self.keep_on_tape(out)
        self.see_peak(cost.scratch)
        return out

    def keep_on_tape(self, out: Any) -> None:
        """What attention keeps under `selective` (`moetrain.tape`): copies, until the recomputation takes them."""
        if replaying():
            self.tape.pop()
            return
        copies = [torch.empty_like(tensor) for tensor in out]
        for copy in copies:
            self.count(copy)
            self.make_activation(copy)
        self.tape.append(copies)

    def add(self, work: dict[str, Work], inputs: Any, out: Any) -> None:
        phase = "backward" if self.backward else "forward"
        if self.fused is not None and "passes" in work:
            self.fused.extend(inputs, out)
            return
        if self.fused is not None and work:
            self.trace.work[phase, "passes"].add(self.fused.end())
        for part, amount in work.items():
            self.trace.work[phase, part].add(amount)

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages or key in self.not_counted:
            return
        size, kind = storage.nbytes(), self.scope[-1] if self.scope else "workspace"
        self.storages[key] = (weakref.ref(storage, lambda _: self.free(key)), kind, size)
        self.live[kind] += size
        self.total += size

    def free(self, key: int) -> None:
        _, kind, size = self.storages.pop(key)
        self.live[kind] -= size
        self.total -= size

    def keep(self, tensor: Tensor) -> Tensor:
        """What autograd saves is kept for the backward."""
        self.make_activation(tensor)
        return tensor.detach()

    def make_activation(self, tensor: Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        if key in self.storages:
            reference, kind, size = self.storages[key]
            self.storages[key] = (reference, "activations", size)
            self.live[kind] -= size
            self.live["activations"] += size

    def see_peak(self, scratch: int = 0) -> None:
        if self.total + scratch > self.peak_total:
            self.peak_total = self.total + scratch
            self.peak = dict(self.live)
            self.peak["workspace"] += scratch

    def event(self, what: str, name: str) -> None:
        self.trace.events.append(Event(what, name, self.backward, self.peak, dict(self.live)))
        self.peak_total, self.peak = self.total, dict(self.live)

    def entered(self, name: str, kind: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.event("enter", name)
            if kind is not None:
                self.scope.append(kind)

        return hook

    def left(self, name: str, kind: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if kind is not None:
                self.scope.pop()
            tensors = [tensor for tensor in tree_iter(output) if isinstance(tensor, Tensor)]
            if not self.backward:
                for tensor in tensors:
                    self.make_activation(tensor)
                differentiable = [tensor for tensor in tensors if tensor.requires_grad]
                if differentiable:
                    differentiable[0].register_hook(lambda _: self.event("return", name))
            self.event("leave", name)

        return hook

    def gradient_ready(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            parameter.grad = None
            self.event("gradient", name)

        return hook
