from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchao.optim.adam import single_param_adam
from torchao.optim.subclass_8bit import OptimState8bit

from moetrain.config import OptimConfig
from moetrain.optim import (
    Quantiser,
    build_optimizer,
    build_scheduler,
    clip_factor,
    clip_grad_norm,
    keep_settings,
    quantised_block,
    stochastic_round_,
)
from moetrain.optim.reference import adamw_ref
from tests import optim_cases as cases
from tests.interpreted import run_interpreted_tests

STATES = cases.STATES
ROOT = Path(__file__).parents[2]


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 64), nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 40))
    return model.to(dtype)


def dtype_for(states: str) -> torch.dtype:
    return torch.float32 if states == "fp32" else torch.bfloat16


def set_grads(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=generator) * 10 ** (seed % 4 - 2)).to(p.dtype)


def reference_adamw(
    values: list[Tensor], grads_of_steps: list[list[Tensor]], decays: list[float], config: OptimConfig
) -> list[Tensor]:
    """AdamW as arXiv 1711.05101 writes it, in fp64."""
    values = [value.double() for value in values]
    exp_avgs = [torch.zeros_like(value) for value in values]
    exp_avg_sqs = [torch.zeros_like(value) for value in values]
    beta1, beta2 = config.betas
    for step, grads in enumerate(grads_of_steps, start=1):
        for i, grad in enumerate(grads):
            exp_avgs[i] = beta1 * exp_avgs[i] + (1 - beta1) * grad.double()
            exp_avg_sqs[i] = beta2 * exp_avg_sqs[i] + (1 - beta2) * grad.double() ** 2
            update = (exp_avgs[i] / (1 - beta1**step)) / ((exp_avg_sqs[i] / (1 - beta2**step)).sqrt() + config.eps)
            values[i] = values[i] * (1 - config.lr * decays[i]) - config.lr * update
    return values


def test_kernels_under_the_interpreter() -> None:
    """Which must be switched on before Triton is imported."""
    run_interpreted_tests("tests/cpu/interpreted_optim.py")


@pytest.mark.parametrize(("states", "dtype"), [(s, cases.dtype_for(s)) for s in STATES] + [("8bit", torch.float32)])
def test_each_update(states: str, dtype: torch.dtype) -> None:
    cases.check_updates(states, dtype, "cpu")


@pytest.mark.parametrize("states", STATES)
def test_parameters_with_gaps(states: str) -> None:
    """A transposed one and every second column, as their copies without gaps; what is between stays."""
    room = torch.randn(64, 128, dtype=cases.dtype_for(states))
    strided = [nn.Parameter(room.clone().t()), nn.Parameter(room[:, ::2])]
    between = room[:, 1::2].clone()
    dense = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in strided]
    for parameters in (strided, dense):
        optimizer = cases.AdamW([{"params": parameters}], 1e-2, cases.BETAS, cases.EPS, states)
        for seed in range(3):
            torch.manual_seed(seed)
            for p in parameters:
                p.grad = torch.randn(p.shape).to(p)
            optimizer.step()
    for p, q in zip(strided, dense, strict=True):
        assert torch.equal(p, q)
    assert torch.equal(room[:, 1::2], between)


def test_factor_in_the_step_is_scaling_before_it() -> None:
    cases.check_clipping("cpu")
    assert clip_factor(torch.tensor(3.0), None) is None
    assert clip_factor(torch.tensor(3.0), 4.0).item() == 1


def test_sum_of_squares() -> None:
    cases.check_sum_of_squares("cpu")


@pytest.mark.parametrize("states", ["fp32", "master"])
def test_exact_states_follow_the_formula(states: str) -> None:
    """fp32 parameters, and the fp32 master of bf16 ones, with decay on the two matrices alone."""
    model = small_model(dtype_for(states))
    config = OptimConfig(lr=3e-3, weight_decay=0.3, states=states)
    optimizer = build_optimizer(model, config)
    start = [p.detach().float().clone() for p in model.parameters()]
    grads = []
    for step in range(8):
        set_grads(model, step)
        grads.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    decays = [0.3 if name in ("2.weight", "3.weight") else 0.0 for name, _ in model.named_parameters()]
    for p, expected in zip(model.parameters(), reference_adamw(start, grads, decays, config), strict=True):
        if states == "master":
            torch.testing.assert_close(optimizer.state[p]["master"].double(), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(p, optimizer.state[p]["master"].bfloat16())
        else:
            torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6)


def test_stochastic_rounding_is_unbiased_and_between_neighbours() -> None:
    value = torch.randn(500) * 10.0 ** torch.randint(-6, 6, (500,))
    value[:4] = torch.tensor([0.0, -0.0, math.inf, -math.inf])
    mean, target = torch.zeros(500, dtype=torch.float64), torch.empty(500, dtype=torch.bfloat16)
    truncated = (value.view(torch.int32) & -(2**16)).view(torch.float32)
    above = ((value.view(torch.int32) & -(2**16)) + 2**16).view(torch.float32)
    for seed in range(400):
        stochastic_round_(target, value, torch.Generator().manual_seed(seed))
        assert ((target.float() == truncated) | (target.float() == above)).all()
        mean += target.double() / 400
    # a draw deviates by at most one unit in the last place, 2**-7 of the value; 5 sigma of 400 draws
    assert ((mean - value)[4:].abs() <= value[4:].abs() * 2**-7 * 0.5 * 5 / 20).all()
    assert torch.equal(target[2:4].float(), value[2:4])
    exact = torch.randn(100).bfloat16()
    stochastic_round_(target[:100], exact.float(), torch.Generator())
    assert torch.equal(target[:100], exact)
    stochastic_round_(
        target[:2], torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32), torch.Generator()
    )
    assert target[:2].isnan().all()


def test_bf16_stochastic_takes_updates_that_nearest_rounding_loses() -> None:
    """Steps of 1e-4 on weights of 1: rounded to nearest (half a unit is 2e-3) they would stay at 1."""
    model = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    config = OptimConfig(lr=1e-4, betas=(0.9, 0.999), states="bf16_stochastic")
    optimizer = build_optimizer(model, config)
    grads = [[torch.full((1,), 1.0 if step == 0 else 2**-6)] for step in range(300)]
    for (grad,) in grads:
        model.weight.grad = grad.bfloat16().expand(256, 256).contiguous()
        optimizer.step()
    moved = 1 - reference_adamw([torch.ones(1)], grads, [0.0], config)[0].item()
    assert 1 - model.weight.double().mean().item() == pytest.approx(moved, rel=0.03)
    # beta2 = 0.999 shrinks exp_avg_sq by 1e-3 a step, half of what rounding to nearest would lose
    second = optimizer.state[model.weight]["exp_avg_sq"]
    expected = 1e-3 * 0.999**299 + 2**-12 * (1 - 0.999**299)
    assert second.dtype == torch.bfloat16
    assert second.double().mean().item() == pytest.approx(expected, rel=3e-3)


def test_stochastic_rounding_differs_between_updates_parameters_and_runs_alike() -> None:
    def run() -> list[Tensor]:
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(2)))
        for p in model.parameters():
            nn.init.ones_(p)
        optimizer = build_optimizer(model, OptimConfig(lr=1e-3, states="bf16_stochastic"))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return [p.detach() for p in model.parameters()]

    first, second = run()
    assert not torch.equal(first, second)
    assert torch.equal(first, run()[0]) and torch.equal(second, run()[1])


@torch.no_grad()
def test_plain_rounding_is_new_in_each_update_parameter_and_shard() -> None:
    """Torch's generator on CPUs takes the lower 32 bits of a seed: those of large numbers must not be lost."""

    def averages(updates: int, number: int, shard: int) -> bytes:
        slot = cases.bf16_slot(torch.full((64,), 1 + 2**-8), number, shard)
        adamw_ref([slot], 0.0, (0.0, 0.0), 1.0, 0.0, None, None, updates)
        return slot.exp_avg.view(torch.uint8).numpy().tobytes()

    seen = {
        averages(updates, number, shard) for updates in (1, 2, 4097, 2**20) for number in range(9) for shard in (0, 7)
    }
    assert len(seen) == 4 * 9 * 2
    assert averages(2, 3, 7) in seen


@pytest.mark.parametrize("signed", [True, False])
def test_quantiser_matches_torchao(signed: bool) -> None:
    value = torch.randn(6, 5, 512) * 10.0 ** torch.randint(-8, 8, (6, 5, 2)).repeat_interleave(256, -1)
    value = value if signed else value.abs()
    theirs = OptimState8bit.zeros(value.shape, signed, 256)
    theirs.copy_(value)
    codes, scale = torch.zeros(value.shape, dtype=torch.uint8), torch.zeros(6, 5, 2)
    mine = Quantiser(signed, torch.device("cpu"))
    mine.write(codes, scale, value)
    # values half-way between two codes may go either way
    assert (codes != theirs.codes).float().mean() < 1e-3
    torch.testing.assert_close(scale.view(-1), theirs.scale)
    torch.testing.assert_close(mine.read(theirs.codes, theirs.scale.view_as(scale)), theirs.dequantize())


@pytest.mark.parametrize("signed", [True, False])
def test_codebook_finds_the_nearest_code(signed: bool) -> None:
    """By one look at the upper bits and one comparison: around all boundaries, for tiny numbers, zeros and NaN."""
    book = Quantiser(signed, torch.device("cpu")).codebook
    between = book.between[:-1]
    value = torch.cat([between, between.nextafter(between + 1), between.nextafter(between - 1), torch.rand(10**6)])
    value = torch.cat([value, -value, torch.rand(100) * 1e-7, torch.tensor([0.0, -0.0, 1.0, -1.0, math.nan])])
    below = book.first[(value.view(torch.int32) >> 16) & 0xFFFF].int()
    code = below + (value > book.between[below])
    assert torch.equal(code, torch.bucketize(value, between, out_int32=True))


def test_8bit_follows_torchaos_adam() -> None:
    torch.manual_seed(0)
    model = nn.Linear(256, 32, bias=False)
    config = OptimConfig(lr=1e-2, weight_decay=0.1, states="8bit")
    optimizer = build_optimizer(model, config)
    theirs = model.weight.detach().clone()
    exact = theirs.clone()
    averages = [OptimState8bit.zeros(theirs.shape, signed, 256) for signed in (True, False)]
    step = torch.tensor(0.0)
    grads = []
    for seed in range(10):
        set_grads(model, seed)
        grads.append([model.weight.grad.clone()])
        optimizer.step()
        step += 1
        lr = torch.tensor(config.lr)
        single_param_adam(theirs, grads[-1][0], step, *averages, None, lr, *config.betas, 0.1, config.eps, True, False)
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.uint8
    torch.testing.assert_close(model.weight.detach(), theirs, rtol=1e-4, atol=1e-4)
    expected = reference_adamw([exact], grads, [0.1], config)[0]
    assert (model.weight - expected).norm() < 0.05 * (exact - expected).norm()


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((64, 256), 256),
        ((8, 64, 2880), 64),
        ((128, 96), 32),
        ((4096,), 0),
        ((4, 4), 0),
        ((1024, 40), 0),
        ((64, 768), 256),
    ],
)
def test_quantised_block(shape: tuple[int, ...], block: int) -> None:
    assert quantised_block(torch.empty(shape, device="meta")) == block


def test_matrices_without_a_block_stay_exact_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(40, 128), nn.Linear(128, 256))
    optimizer = build_optimizer(model, OptimConfig(states="8bit"))
    assert "(128, 40)" in caplog.text and "(256, 128)" not in caplog.text
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[model[1].weight]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[model[1].bias]["exp_avg"].dtype == torch.float32


def test_decay_is_for_matrices_of_an_expert_and_not_for_embeddings() -> None:
    class Experts(nn.Module):
        is_transposed, has_gate, num_experts = False, True, 4

        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 6, 8))
            self.gate_up_proj_bias = nn.Parameter(torch.randn(4, 6))

    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "experts": Experts(), "norm": nn.LayerNorm(8)})
    model["tied"] = nn.Linear(8, 10, bias=False)
    model["tied"].weight = model["embed"].weight
    model["head"] = nn.Linear(8, 10)
    model["frozen"] = nn.Linear(8, 8).requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.5))
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: decay_of.get(id(p)) for name, p in model.named_parameters()}
    assert by_name == {
        "embed.weight": 0.0,
        "experts.gate_up_proj": 0.5,
        "experts.gate_up_proj_bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "head.weight": 0.5,
        "head.bias": 0.0,
        "frozen.weight": None,
        "frozen.bias": None,
    }


@pytest.mark.parametrize("states", STATES)
def test_saved_state_continues_bit_equal(states: str) -> None:
    cases.check_resume(states, "cpu")


def test_count_of_updates_comes_from_the_checkpoint_and_settings_from_the_run() -> None:
    """The plain path's random bits depend on the count."""
    saved = build_optimizer(small_model(), OptimConfig(lr=1e-3))
    for _ in range(3):
        saved.step()
    optimizer = build_optimizer(small_model(), OptimConfig(lr=1e-2, betas=(0.5, 0.6)))
    scheduler = build_scheduler(optimizer, OptimConfig(warmup_steps=0), 10)
    with keep_settings(optimizer, scheduler):
        optimizer.load_state_dict(saved.state_dict())
    for group in optimizer.param_groups:
        assert (group["updates"], group["betas"], group["lr"]) == (3, (0.5, 0.6), 1e-2)


def test_state_of_another_kind_is_refused() -> None:
    model = small_model(torch.bfloat16)
    saved = build_optimizer(model, OptimConfig(states="8bit")).state_dict()
    with pytest.raises(ValueError, match=r"optim\.states=master.*resume with"):
        build_optimizer(model, OptimConfig(states="master")).load_state_dict(saved)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, "fp32"), (torch.bfloat16, "master")])
def test_auto_states(dtype: torch.dtype, expected: str) -> None:
    assert build_optimizer(small_model(dtype), OptimConfig()).states == expected


def test_unusable_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="choose master"):
        build_optimizer(small_model(torch.bfloat16), OptimConfig(states="fp32"))
    with pytest.raises(ValueError, match=r"torch\.float16"):
        build_optimizer(small_model(torch.float16), OptimConfig())
    with pytest.raises(ValueError, match="unfreeze"):
        build_optimizer(small_model().requires_grad_(False), OptimConfig())


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_schedule(schedule: str, warmup: int) -> None:
    steps, lr, ratio = 10, 2e-3, 0.25
    config = OptimConfig(lr=lr, schedule=schedule, warmup_steps=warmup, min_lr_ratio=ratio)
    optimizer = build_optimizer(small_model(), config)
    scheduler = build_scheduler(optimizer, config, steps)
    seen = []
    for step in range(steps):
        if step == 6:  # a resumed run goes on
            state = scheduler.state_dict(), optimizer.state_dict()
            optimizer = build_optimizer(small_model(), config)
            scheduler = build_scheduler(optimizer, config, steps)
            scheduler.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) == 1
        seen.append(rates.pop())
        optimizer.step()
        scheduler.step()
    peak = max(warmup - 1, 0)
    for step, rate in enumerate(seen):
        t = (step - peak) / (9 - peak)
        shape = {"cosine": (1 + math.cos(math.pi * t)) / 2, "linear": 1 - t, "constant": 1.0}[schedule]
        expected = lr * (step + 1) / warmup if step < peak else lr * (ratio + (1 - ratio) * shape)
        expected = lr if schedule == "constant" and step >= peak else expected
        assert rate == pytest.approx(expected, rel=1e-12), step
    assert seen[peak] == pytest.approx(lr)
    assert seen[-1] == pytest.approx(lr if schedule == "constant" else lr * ratio)


@pytest.mark.parametrize("max_norm", [None, 0.1, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_matches_torch(max_norm: float | None, dtype: torch.dtype) -> None:
    model = small_model(dtype)
    set_grads(model, 2)
    model[1].weight.grad = None
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    expected = torch.cat([g.double().flatten() for g in grads]).norm()
    norm = clip_grad_norm(model.parameters(), max_norm)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    scale = 1.0 if max_norm is None else min(1.0, max_norm / (expected.item() + 1e-6))
    for before, p in zip(grads, [p for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(p.grad, (before.double() * scale).to(dtype), rtol=2**-8 if scale != 1 else 0, atol=0)


def test_clip_is_exact_for_large_tensors() -> None:
    """One fp32 sum over 4M squares is off by 1e-4 on a CPU."""
    p = nn.Parameter(torch.zeros(4_000_001))
    p.grad = torch.rand(4_000_001)
    assert clip_grad_norm([p], None).item() == pytest.approx(p.grad.double().norm().item(), rel=1e-6)


def test_clip_measures_norms_whose_square_overflows() -> None:
    """Two norms of about 1.5e19: each square fits fp32 (3.4e38), their sum does not."""
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    parameters[0].grad = torch.tensor([1.2e19, 0.0, 0.0])
    parameters[1].grad = torch.tensor([0.0, 1.6e19, 0.0])
    assert clip_grad_norm(parameters, 1.0).item() == pytest.approx(2e19)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0, 0.0]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.0, 0.8, 0.0]))
