"""Checks of the optimizer that hold for its plain path, its kernel under Triton's interpreter, and its kernel on a GPU.

Updates are compared one by one with AdamW as arXiv 1711.05101 writes it, in float64, from what was stored before them.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from moetrain.kernels._triton import INTERPRETED
from moetrain.kernels.adamw import Slot, adamw
from moetrain.kernels.tensor_list import sum_of_squares
from moetrain.optim import AdamW, Quantiser, clip_factor, clip_grad_norm, grad_norm

STATES = ("fp32", "master", "bf16_stochastic", "8bit")
SHAPES = ((1,), (7,), (0, 8), (64, 96), (3, 40, 64), (16385,), (2, 3, 3072), (5, 1280))
"""One element, no chunk or tile or vector that fits, none at all, experts, several chunks; blocks of 32, 64 and 256."""
LR, BETAS, EPS, DECAY = 3e-3, (0.9, 0.95), 1e-8, 0.1


def dtype_for(states: str) -> torch.dtype:
    return torch.float32 if states == "fp32" else torch.bfloat16


def build(states: str, dtype: torch.dtype, device: str, shapes: tuple = SHAPES) -> tuple[list[nn.Parameter], AdamW]:
    """Every second parameter decays. The last is fp32, as routers are in bf16 models."""
    torch.manual_seed(0)
    types = [dtype] * (len(shapes) - 1) + [torch.float32]
    parameters = [nn.Parameter(torch.randn(shape).to(device, kind)) for shape, kind in zip(shapes, types, strict=True)]
    groups = [{"params": parameters[::2], "weight_decay": DECAY}, {"params": parameters[1::2], "weight_decay": 0.0}]
    return parameters, AdamW([group for group in groups if group["params"]], LR, BETAS, EPS, states)


def set_grads(parameters: list[nn.Parameter], seed: int) -> None:
    """Gradients at new addresses, one at an odd one, one with gaps; the fourth parameter has none in odd steps."""
    generator = torch.Generator().manual_seed(seed)
    for number, p in enumerate(parameters):
        grad = (torch.randn(p.shape, generator=generator) * 10 ** (seed % 4 - 2)).to(p)
        if number == 4:
            room = torch.full((grad.numel() + 1,), math.nan, dtype=p.dtype, device=p.device)
            grad = room[1:].view(p.shape).copy_(grad)
        elif number == 6:
            grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
        p.grad = None if number == 3 and seed % 2 else grad


def check_updates(states: str, dtype: torch.dtype, device: str) -> None:
    """Four updates of all shapes, with and without a factor on the gradients, with gradients that move and lack."""
    parameters, optimizer = build(states, dtype, device)
    decays = [DECAY if number % 2 == 0 else 0.0 for number in range(len(parameters))]
    kept = []
    for seed in range(4):
        set_grads(parameters, seed)
        kept.append([p.grad for p in parameters])  # so that the next ones cannot be at their addresses
        grads = [None if p.grad is None else p.grad.clone() for p in parameters]
        factor = None if seed == 1 else torch.tensor(0.3 + seed, device=device)
        before = [read_state(p, optimizer) for p in parameters]
        optimizer.step(grad_factor=factor)
        for p, grad, was, decay in zip(parameters, grads, before, decays, strict=True):
            if grad is None:
                assert was.keys() == read_state(p, optimizer).keys()
                assert all(torch.equal(was[name], now) for name, now in read_state(p, optimizer).items())
            else:
                assert torch.equal(p.grad, grad)
                scaled = grad.double() * (1.0 if factor is None else factor.double())
                check_update(p, optimizer, was, scaled, decay)


def read_state(p: nn.Parameter, optimizer: AdamW) -> dict[str, Tensor]:
    """Copies of parameter and state; of 8-bit averages their values too."""
    state = {name: tensor.clone() for name, tensor in optimizer.state[p].items()}
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        if f"{name}_scale" in state:
            quantiser = Quantiser(signed, p.device)
            state[f"{name}_value"] = quantiser.read(state[name], state[f"{name}_scale"])
    return state | {"parameter": p.detach().clone()}


def check_update(p: nn.Parameter, optimizer: AdamW, was: dict[str, Tensor], grad: Tensor, decay: float) -> None:
    step = int(was["step"]) + 1
    assert optimizer.state[p]["step"].item() == step
    if p.numel() == 0:
        return
    averages, sizes = {}, {}
    for name, beta, power in (("exp_avg", BETAS[0], 1), ("exp_avg_sq", BETAS[1], 2)):
        old, new = beta * was.get(f"{name}_value", was[name]).double(), (1 - beta) * grad**power
        averages[name], sizes[name] = old + new, old.abs() + new.abs()
        check_average(name, optimizer.state[p], averages[name], sizes[name])
    rate = LR / (1 - BETAS[0] ** step) / ((averages["exp_avg_sq"] / (1 - BETAS[1] ** step)).sqrt() + EPS)
    decayed = was.get("master", was["parameter"]).double() * (1 - LR * decay)
    exact, size = decayed - rate * averages["exp_avg"], decayed.abs() + rate * sizes["exp_avg"]
    if "master" in was:
        master = optimizer.state[p]["master"]
        assert_close(master, exact, size)
        # the interpreter cuts where a GPU rounds to nearest
        assert_neighbour(p, master.double(), master) if INTERPRETED else assert_equal(p, master.bfloat16())
    elif p.dtype == torch.float32:
        assert_close(p, exact, size)
    else:
        assert_neighbour(p, exact, size)


def check_average(name: str, state: dict[str, Tensor], expected: Tensor, size: Tensor) -> None:
    if state[name].dtype == torch.float32:
        assert_close(state[name], expected, size)
    elif state[name].dtype == torch.bfloat16:
        assert_neighbour(state[name], expected, size)
    else:
        scale = state[f"{name}_scale"]
        blocks = expected.view(*scale.shape, -1)
        assert_close(scale, blocks.abs().amax(-1).clamp(min=1e-12), size.view_as(blocks).amax(-1))
        ratio = (blocks / scale[..., None]).view_as(expected)
        values = Quantiser(name == "exp_avg", scale.device).codebook.values.double()
        nearest = values[torch.searchsorted((values[1:] + values[:-1]) / 2, ratio)]
        assert ((values[state[name].int()] - ratio).abs() <= (nearest - ratio).abs() + 1e-6).all()


def assert_equal(result: Tensor, expected: Tensor) -> None:
    assert torch.equal(result, expected)


def assert_close(result: Tensor, exact: Tensor, size: Tensor) -> None:
    """But for arithmetic in fp32 with terms of this size."""
    assert ((result.double() - exact).abs() <= 1e-6 * size).all()


def assert_neighbour(rounded: Tensor, exact: Tensor, size: Tensor) -> None:
    """One of the two bf16 numbers around the exact one, but for arithmetic in fp32 with terms of this size."""
    slack = 1e-6 * size.abs()
    unit = 2.0 ** ((exact.abs() + slack).clamp(min=1e-30).log2().floor() - 7)
    assert ((rounded.double() - exact).abs() <= unit + slack).all()


def bf16_slot(grad: Tensor, number: int = 0, shard: int = 0, step: int = 0) -> Slot:
    """A bf16 parameter of ones with zero averages and an fp32 gradient."""
    like = torch.zeros_like(grad, dtype=torch.bfloat16)
    steps = torch.full((), float(step), device=grad.device)
    return Slot(torch.ones_like(like), grad, like.clone(), like.clone(), steps, None, None, None, number, shard)


def update(slots: list[Slot], betas: tuple[float, float] = (0.0, 0.0), lr: float = 0.0, eps: float = 1.0) -> None:
    rate = torch.tensor(lr, dtype=torch.float64, device=slots[0].grad.device)
    adamw(slots, rate, betas, eps, 0.0, None, None)


def check_rounding_is_unbiased(device: str) -> None:
    """The means of 1024 roundings of 64 numbers each; infinities and NaN of any bits stay."""
    value = torch.randn(64) * 10.0 ** torch.randint(-6, 6, (64,))
    slot = bf16_slot(value.repeat_interleave(1024).to(device))
    update([slot])  # with both betas 0 the averages are gradient and square
    for average, exact in ((slot.exp_avg, value.double()), (slot.exp_avg_sq, (value * value).double())):
        rounded = average.double().cpu().view(64, 1024)
        low = rounded.min(1).values.abs().minimum(rounded.max(1).values.abs())
        assert (low <= exact.abs()).all()
        unit = 2.0 ** (exact.abs().log2().floor() - 7)
        assert (((rounded - exact[:, None]) / unit[:, None]).abs() <= 1).all()
        # the variance of a rounding is at most a quarter of a unit's square
        assert ((rounded.mean(1) - exact).abs() <= 5 * unit / 2 / math.sqrt(1024)).all()
    # 8 of 65,536 parts of a unit: one of the lowest bits too few, and it never goes up
    slot = bf16_slot(torch.full((2**16,), 1 + 8 * 2.0**-23, device=device))
    update([slot])
    assert 0 < (slot.exp_avg > 1).sum().item() < 30
    special = torch.tensor([0x7F800000, -0x800000, 0x7FFFFFFF, -1, 0x7F800001, 0, -0x80000000], dtype=torch.int64)
    special = special.int().view(torch.float32).to(device)
    slot = bf16_slot(special)
    update([slot])
    assert torch.equal(slot.exp_avg[:2].float(), special[:2])
    assert slot.exp_avg[2:5].isnan().all() and slot.exp_avg_sq[2:5].isnan().all() and slot.parameter[2:5].isnan().all()
    assert (slot.exp_avg[5:] == 0).all()


def check_random_bits(device: str) -> None:
    """Up or down for numbers half-way between two of bf16: the same again for the same update, parameter and shard, and
    else independent; so are parameter and averages, and neighbours, those of a pair and of other chunks included."""
    numbers = 3 * 16384
    half_way = torch.full((numbers,), 1.0 + 2**-8, device=device)

    def ups(step: int = 0, number: int = 0, shard: int = 0, place: int = 0) -> list[Tensor]:
        """Of parameter and averages, in a launch with others before and after."""
        around = [bf16_slot(torch.ones(17 * place, device=device), 5) for _ in range(place)]
        slot = bf16_slot(half_way, number, shard, step)
        # root 2**-8 of the square, so that the parameter moves by 2**-9, half of the way to the next below 1
        rate = 2**-9 * (1 + 2**-8 + 1) / (1 + 2**-8)
        update([*around, slot, *around], lr=rate, eps=1.0)
        square = half_way.double() ** 2
        sides = [slot.parameter.double() > 1 - 2**-9, slot.exp_avg.double() > half_way]
        return [side.double() - side.double().mean() for side in (*sides, slot.exp_avg_sq.double() > square)]

    first = ups()
    assert all(torch.equal(a, b) for a, b in zip(first, ups(place=2), strict=True))
    others = [*ups(step=1), *ups(number=1), *ups(shard=1), *ups(step=2**20), *first[1:]]
    others += [first[0].roll(lag) for lag in (1, 2, 8, 32, 256, 1024, 2048, 16384)]
    for other in others:
        correlation = (first[0] @ other) / (first[0].norm() * other.norm())
        assert abs(correlation.item()) < 5 / math.sqrt(numbers)


def check_resume(states: str, device: str, shapes: tuple = SHAPES) -> None:
    """Two steps, saved and loaded into an optimizer with another rate, and two more of both: the same bits."""
    parameters, optimizer = build(states, dtype_for(states), device, shapes)
    for seed in range(2):
        set_grads(parameters, seed)
        optimizer.step()
    others, resumed = build(states, dtype_for(states), device, shapes)
    for p, q in zip(parameters, others, strict=True):
        q.data.copy_(p.data)
    for group in resumed.param_groups:
        group["lr"] = 1.0
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(2, 4):
        for each, which in ((parameters, optimizer), (others, resumed)):
            set_grads(each, seed)
            which.step(grad_factor=torch.tensor(0.7, device=device))
    for p, q in zip(parameters, others, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(tensor, resumed.state[q][name]) for name, tensor in optimizer.state[p].items())


def check_clipping(device: str) -> None:
    """The factor in the step is the scaling before it."""
    (parameters, optimizer), (others, expected) = (build("fp32", torch.float32, device) for _ in range(2))
    for seed in range(2):
        set_grads(parameters, seed)
        set_grads(others, seed)
        factor = clip_factor(grad_norm(parameters), 0.5)
        norm = clip_grad_norm(others, 0.5)
        assert factor.item() < 1
        torch.testing.assert_close(factor, 0.5 / (norm + 1e-6))
        optimizer.step(grad_factor=factor)
        expected.step()
    for p, q in zip(parameters, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def check_sum_of_squares(device: str) -> None:
    """Lists of both types, sizes that fit nothing, odd addresses, gaps, none at all; and the same bits again."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=device) * 10 for shape in SHAPES]
    tensors += [tensor.bfloat16() for tensor in tensors] + [torch.randn(70001, device=device)[1:]]
    tensors += [torch.randn(300, 200, device=device).t(), torch.randn(33, 100, device=device)[:, 3:77]]
    expected = sum(tensor.double().square().sum() for tensor in tensors)
    squares = sum_of_squares(tensors)
    assert squares.dtype == torch.float64
    torch.testing.assert_close(squares, expected, rtol=4e-6, atol=0)  # norms in fp32 on CPUs
    assert torch.equal(squares, sum_of_squares(tensors))
    assert sum_of_squares([torch.zeros(0, 4, device=device)]).item() == 0
    far = [torch.tensor([1.2e19, 0.0], device=device), torch.tensor([0.0, 1.6e19], device=device)]
    assert abs(sum_of_squares(far).item() / 4e38 - 1) < 1e-6
