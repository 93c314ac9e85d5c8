"""choose_cut and Cut.apply: their choice, the frozen tensors, and that nothing else changes."""

import contextlib
import copy
import functools
import math
import os
import pickle
import random
import statistics
import threading
import types

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import differences, exact
from tiny import TRAINER, Recomputed, assert_same_weights, in_fabric, tiny_llama
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from grades_kernels import (
    ActivationCache,
    Cut,
    FreezeReport,
    GradESAdamW,
    choose_cut,
    grades_param_groups,
)
from grades_kernels.cut import choose, costs
from grades_kernels.cut.blocks import find_stack
from grades_kernels.cut.cut import Candidate


class Block(nn.Module):
    def __init__(self, dim, dropout=0.0):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.fc2(self.dropout(torch.tanh(self.fc1(self.norm(x)))))


def call(block, x):
    return block(x)


class Model(nn.Module):
    """Embedding and position, blocks, head; `tied` makes the head the embedding."""

    def __init__(self, n=4, dim=12, vocabulary=9, tied=False, dropout=0.0, call=call):
        super().__init__()
        self.call = call
        self.embed = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(0.1 * torch.randn(6, dim))
        self.layers = nn.ModuleList(Block(dim, dropout) for _ in range(n))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def through_blocks(self, x):
        return functools.reduce(lambda x, block: self.call(block, x), self.layers, x)

    def forward(self, tokens):
        x = self.through_blocks(self.embed(tokens) + self.position)
        return self.head(self.norm(x).mean(1))


def loss_of(model, batch):
    return F.cross_entropy(model(batch), batch.sum(1) % 3)


def language_loss(model, batch):
    return model(input_ids=batch, labels=batch).loss


def batches(n=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 9, (8, 6), generator=generator) for _ in range(n)]


def make(seed=0, kind=Model, **options):
    torch.manual_seed(seed)
    return kind(**options)


def cut_of(model=None, **options):
    return choose_cut(model or make(), loss_of, batches(), **options)


BELOW = ("position", "embed.weight")


def bits(model):
    """Everything that training depends on."""
    found = {
        "state": model.state_dict(),
        "parameters": {n: (p.grad, p.requires_grad) for n, p in model.named_parameters()},
        "modes": {name: m.training for name, m in model.named_modules()},
        "hooks": [len(m._forward_pre_hooks) for m in model.modules()],
        "tensor hooks": [len(p._backward_hooks or ()) for p in model.parameters()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
    }
    return exact(found)


# Tensors below the blocks


def test_what_acts_through_the_blocks_alone_is_below_them():
    cut = cut_of()
    assert sorted(cut.segments[0]) == sorted(BELOW)
    assert [len(segment) for segment in cut.segments[1:]] == [6] * 4
    assert [candidate.k for candidate in cut.candidates] == [None, 0, 1, 2, 3, 4]


def test_inputs_of_the_blocks_may_be_keywords():
    model = make(call=lambda block, x: block(x=x))
    assert sorted(cut_of(model).segments[0]) == sorted(BELOW)
    assert_not_cached(model, cached(model), "do not begin with a tensor")


@pytest.mark.parametrize("tied", ["train", "freeze"])
def test_a_tied_embedding_trains_unless_asked_otherwise(tied):
    cut = cut_of(make(tied=True), tied=tied)
    assert ("embed.weight" in cut.segments[0]) == (tied == "freeze")
    cost = {x.k: x.cost for x in cut.candidates}
    model = make(tied=True)
    cut.at(2).apply(model)
    loss_of(model, batches()[0]).backward()
    assert (model.embed.weight.grad is None) == (tied == "freeze")
    assert cost[2] < 0.7 if tied == "freeze" else cost[2] > 0.7  # backward reaches the bottom
    assert ("embed.weight is used above the blocks too" in str(cut)) == (tied == "train")


def test_a_tower_that_feeds_the_blocks_is_below_them_and_another_stack_is_named():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision = nn.ModuleList(Block(12) for _ in range(2))
            self.text = Model(n=3)

        def forward(self, batch):
            x = functools.reduce(lambda x, block: block(x), self.vision, self.text.embed(batch))
            return self.text.head(self.text.through_blocks(x).mean(1))

    model = make(kind=Pair)
    with pytest.raises(ValueError, match=r"several.*'vision' \(2 blocks\), 'text.layers' \(3"):
        cut_of(model)
    below = cut_of(model, blocks="text.layers").segments[0]
    tower = {name for name, _ in model.named_parameters() if name.startswith("vision")}
    assert {*tower, "text.embed.weight"} <= set(below)
    with pytest.raises(ValueError, match=r"blocks='text' is no stack.*'vision'"):
        cut_of(model, blocks="text")


class Around(Model):
    """The residual connection goes around the blocks; another part of the head begins at zero."""

    def __init__(self):
        super().__init__()
        self.more, self.gate = nn.Linear(12, 9), nn.Parameter(torch.zeros(1))

    def through_blocks(self, x):
        for block in self.layers:
            x = x + block.fc2(torch.tanh(block(x)))
        return x

    def forward(self, tokens):
        x = self.through_blocks(self.embed(tokens) + self.position)
        return self.head(self.norm(x).mean(1)) + self.gate * self.more(x.mean(1))


class Latents(Around):
    """The input of the blocks is a parameter, which gets the gradient itself."""

    def forward(self, tokens):
        x = self.through_blocks(self.position)
        return self.head(self.norm(x).mean(0) + self.embed(tokens).mean(1))


@pytest.mark.parametrize(("kind", "below"), [(Around, BELOW), (Latents, ("position",))])
def test_what_goes_around_the_blocks_comes_from_below(kind, below):
    model = make(kind=kind)
    before = bits(model)
    cut = cut_of(model)
    assert bits(model) == before
    assert sorted(cut.segments[0]) == sorted(below) and cut.tied == ()
    cut.at(3).apply(model)
    loss_of(model, batches()[0]).backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} >= {*cut.at(3).frozen}


def test_what_enters_higher_blocks_too_is_above():
    """As the output of an encoder does in every block of a decoder."""

    class Decoder(Model):
        def __init__(self):
            super().__init__(call=lambda block, x: block(x + self.memory) + block(self.memory))
            self.encoder = nn.Embedding(9, 12)

        def forward(self, tokens):
            self.memory = self.encoder(tokens)
            return super().forward(tokens)

    assert sorted(cut_of(make(kind=Decoder)).segments[0]) == sorted(BELOW)


def test_an_embedding_of_another_stack_is_not_tied():
    class Two(Model):
        def __init__(self):
            super().__init__(n=2, dropout=0.5)
            self.other = Model(n=2)

        def forward(self, tokens):
            return super().forward(tokens) + self.other(tokens)

    cut = cut_of(make(kind=Two), blocks="layers", tied="freeze")
    assert not [name for name in cut.at(2).frozen if name.startswith("other.")]
    assert cut_of(Two(), blocks="layers").tied == ()


def test_frozen_stacks_and_lists_inside_of_blocks_are_no_stacks():
    model = nn.ModuleDict({
        "frozen": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False),
        "single": nn.Sequential(nn.Linear(3, 3)),
        "head": nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh()),
        "layers": nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2)),
    })  # fmt: skip
    assert find_stack(model).name == "layers"


def test_lists_of_single_layers_are_stacks_where_there_is_no_other():
    model = make(n=2)
    model.head = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 9))
    model.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(3))
    assert find_stack(model).name == "layers"
    assert find_stack(model, "head").name == "head"
    del model.layers
    with pytest.raises(ValueError, match=r"several.*'head' \(2 blocks\), 'norms' \(3"):
        find_stack(model)
    del model.norms
    assert find_stack(model).name == "head"


def test_a_stack_may_alternate_two_classes_and_a_model_is_none():
    layers = nn.ModuleList(nn.Linear(2, 2) if k % 2 else nn.LayerNorm(2) for k in range(4))
    model = nn.ModuleDict({"embed": nn.Embedding(2, 2), "layers": layers, "norm": nn.LayerNorm(2)})
    assert find_stack(model).name == "layers"
    wrapped = torch.compile(nn.Linear(2, 2), backend="eager")
    assert len(find_stack(nn.ModuleDict({"0": nn.Linear(2, 2), "1": wrapped})).blocks) == 2
    for none in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))):
        with pytest.raises(ValueError, match=f"{type(none).__name__} has no repeated blocks"):
            choose_cut(none, loss_of, batches())


def test_two_modules_of_one_class_are_no_stack_outside_of_a_list():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = Model(n=2), Model(n=3)

    with pytest.raises(ValueError, match=r"several stacks of blocks: 'one.layers' \(2"):
        find_stack(Towers())


def test_blocks_are_counted_as_they_run():
    class Reversed(Model):
        def through_blocks(self, x):
            return functools.reduce(lambda x, block: block(x), reversed(self.layers), x)

    cut = cut_of(make(kind=Reversed))
    assert cut.segments[1][0].startswith("layers.3.")
    cost = [candidate.cost for candidate in cut.candidates]
    assert cost == sorted(cost, reverse=True) and cost[-1] < 0.5


def test_a_place_for_a_cut_freezes_something_and_leaves_something():
    model = make()
    for part in (model.embed, model.layers[0], model.norm, model.head):
        part.requires_grad_(False)
    model.position.requires_grad_(False)
    cut = cut_of(model)
    assert [candidate.k for candidate in cut.candidates] == [None, 2, 3]
    assert [candidate.cost < 1 for candidate in cut.candidates] == [False, True, True]


class Headless(Model):
    """The blocks are the highest part that trains; the head is left over from another task."""

    def forward(self, tokens):
        x = self.through_blocks(self.embed(tokens) + self.position)
        return F.layer_norm(x, x.shape[-1:]).mean(1)


def test_no_cut_leaves_only_tensors_without_a_gradient():
    cut = cut_of(make(kind=Headless))
    assert [candidate.k for candidate in cut.candidates] == [None, 0, 1, 2, 3]
    assert cut.gains[-1] == 0 and cut.gains[-2] != 0  # that of the highest block


def test_without_a_place_for_a_cut_there_is_none(tmp_path):
    model = make(kind=Headless)
    for part in (model.embed, *model.layers[:3]):
        part.requires_grad_(False)
    model.position.requires_grad_(False)
    cut = cut_of(model)
    assert cut.k is None and cut.reason == "nothing that trains lies below another part that does"
    assert "no cut" in str(cut) and cut.apply(model) == []
    cut.plot(tmp_path / "cut.png")


def test_blocks_that_are_left_out_at_random_keep_their_order():
    def drop(block, x):
        return block(x) if torch.rand(()) > 0.5 else x

    for seed in range(3):
        cut = cut_of(make(seed, call=drop))
        assert sorted(cut.segments[0]) == sorted(BELOW)
        assert [segment[0].split(".")[1] for segment in cut.segments[1:]] == list("0123")


# The measurement


def test_nothing_has_changed_afterwards():
    model = make(dropout=0.3)
    model.layers[0].register_buffer("count", torch.zeros(3))
    model.layers[0].register_forward_pre_hook(lambda m, _: m.count.add_(1).__len__() and None)
    loss_of(model, batches()[0]).backward()
    model.layers[1].eval()
    random.seed(3)
    before = bits(model)

    def loss(model, batch):
        return loss_of(model, batch) + 0.1 * random.random() + 0.1 * np.random.rand()

    choose_cut(model, loss, batches())
    assert differences(before, bits(model)) == []


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_it_computes_gradients_wherever_it_is_called(without_gradients):
    model, given, expected = make(), batches(), cut_of(make())
    with without_gradients():
        assert choose_cut(model, loss_of, given) == expected


def test_evaluation_mode_is_reported():
    """`from_pretrained` leaves a model in it, and without dropout another cut may be best."""
    with pytest.warns(UserWarning, match=r"evaluation mode.*model.train\(\)"):
        choose_cut(make().eval(), loss_of, batches())


def direction_of(model, n=6):
    return choose._direction(model, loss_of, batches(), n, find_stack(model), (0.8, 0.95), 1e-3)


@pytest.mark.parametrize("name", ["embed.weight", "layers.1.fc1.weight", "norm.bias"])
def test_the_trial_takes_the_step_of_adamw(name):
    """After the first two thirds of the batches, with the weights as they are."""
    model = make(seed=2)
    first, used, fresh, steps = direction_of(model)
    p = dict(model.named_parameters())[name]
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for batch in batches()[:4]:
        model.zero_grad()
        loss_of(model, batch).backward()
        m.lerp_(p.grad, 0.2)
        v.mul_(0.95).addcmul_(p.grad, p.grad, value=0.05)
    expected = m / (1 - 0.8**4) / ((v / (1 - 0.95**4)).sqrt() + 1e-3)
    torch.testing.assert_close(steps[name], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(first, batches()[0]) and list(fresh) == [5, 6]
    assert used == dict(model.named_parameters()).keys()


def test_the_gain_of_a_cut_is_what_its_step_takes_from_the_loss_of_fresh_batches():
    model = make(seed=2)
    _, _, fresh, steps = direction_of(model, 12)
    cut = choose_cut(model, loss_of, batches(), betas=(0.8, 0.95), eps=1e-3)
    named = dict(model.named_parameters())

    def gains(lr, frozen=()):
        moved = {n: p - lr * steps[n] if n not in frozen else p for n, p in named.items()}
        return statistics.mean(
            (
                loss_of(model, b)
                - F.cross_entropy(torch.func.functional_call(model, moved, (b,)), b.sum(1) % 3)
            ).item()
            for b in fresh.values()
        )

    whole = sum(cut.gains)
    (lr,) = (2.0**e for e in range(-16, 7) if gains(2.0**e) == pytest.approx(whole, rel=1e-4))
    assert gains(lr) > 1.5 * gains(lr / 2) and gains(2 * lr) < 1.5 * gains(lr)
    for candidate in cut.candidates[1:]:
        gain = gains(lr, cut.at(candidate.k).frozen)
        assert candidate.gain * whole == pytest.approx(gain, rel=1e-3, abs=1e-5)
        assert sum(cut.gains[candidate.k + 1 :]) == pytest.approx(gain, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("best", [3e-4, 0.01, 0.5])
def test_the_learning_rate_of_the_trial_is_where_a_parabola_has_most_of_its_gain(best):
    """Between 0.4 and 0.8 of the best one, whether the search goes up or down."""
    model = make(n=2)
    names = [name for name, _ in model.named_parameters()]
    start = model.norm.bias.detach().clone()

    def losses():
        lr = (start - model.norm.bias)[0] / best
        return (-lr + lr * lr / 2).expand(2)

    steps = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    gains = choose._gains(model, losses, steps, ((), names[:1], ()), [1])
    x = 1 - math.sqrt(1 - 2 * gains[None][0])
    assert 0.39 < x < 0.81 and gains[1] == pytest.approx(gains[None])


def test_gains_between_the_measured_cuts_are_interpolated():
    cut = cut_of(make(n=20))
    inner = [x.gain for x in cut.candidates[2:]]
    kinks = [
        abs(a - 2 * b + c) > 1e-9 for a, b, c in zip(inner, inner[1:], inner[2:], strict=False)
    ]
    assert sum(kinks) <= choose.MEASURED_GAINS
    assert sum(cut.gains[21:]) == pytest.approx(cut.candidates[-1].gain * sum(cut.gains))


def test_a_forward_pass_that_replaces_buffers_changes_none():
    class Counting(Model):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(2))
            self.register_buffer("late", None)
            self.register_buffer("expanded", torch.zeros(1).expand(3))

        def forward(self, tokens):
            self.count, self.late = self.count + 1, torch.ones(1)
            return super().forward(tokens)

    model = Counting()
    count = model.count
    cut_of(model)
    assert model.count is count and count.tolist() == [0, 0] and model.late is None


def test_a_loss_may_take_its_labels_out_of_the_batch():
    """The training that follows finds the batches as they were."""

    def loss(model, batch):
        return F.cross_entropy(model(batch["tokens"]), batch.pop("labels"))

    given = [{"tokens": batch, "labels": batch.sum(1) % 3} for batch in batches()]
    assert choose_cut(make(), loss, given) == cut_of()
    assert all(len(batch) == 2 for batch in given)


@pytest.mark.parametrize("tied", [False, True])
def test_a_choice_takes_some_thirty_steps_and_its_trials_draw_alike(tied):
    calls, drawn = [], []

    def loss(model, batch):
        calls.append(torch.is_grad_enabled())
        drawn.append(torch.rand(()).item())
        return loss_of(model, batch)

    choose_cut(make(tied=tied), loss, batches())
    assert sum(calls) == 8 + (6 if tied else 5)  # with a backward pass
    trials = [x for x, backward in zip(drawn, calls, strict=True) if not backward]
    assert len(trials) % 4 == 0 and len(trials) <= 4 * (1 + 9 + 6)
    assert trials == trials[:4] * (len(trials) // 4)  # all have the same dropout


def test_a_tensor_of_two_blocks_is_frozen_with_the_higher_one():
    model = make()
    model.layers[2].fc1.weight = model.layers[0].fc1.weight
    cut = cut_of(model)
    assert [len(segment) for segment in cut.segments] == [2, 5, 6, 6, 6]
    assert "layers.0.fc1.weight" in cut.segments[3]


@pytest.mark.parametrize(("n", "tolerance"), [(8, 0.06), (20, 0.04)], ids=["measured", "between"])
def test_costs_are_those_of_a_prefix(n, tolerance):
    """Blocks of one size: a step costs (3 - 2k/n) forward passes, the embedding costs none.

    Those between the measured cuts are interpolated.
    """
    cost = {x.k: x.cost for x in cut_of(make(n=n, dim=64)).candidates}
    assert cost[None] == 1
    for k in range(1, n):
        assert cost[k] == pytest.approx(1 - 2 / 3 * k / n, abs=tolerance)


def test_blocks_of_other_sizes_are_interpolated_by_their_multiply_adds():
    """Blocks that alternate: by their number alone the cost of odd cuts would be 0.1 off."""

    def alternating():
        model = make(n=6, dim=32)
        for block in model.layers[::2]:
            block.fc1, block.fc2 = nn.Linear(32, 256), nn.Linear(256, 32)
        return model

    cut = cut_of(alternating())
    batch, whole = batches()[0], None
    for candidate in cut.candidates:
        model = alternating()
        cut.at(candidate.k).apply(model)
        with FlopCounterMode(display=False) as counter:
            loss_of(model, batch).backward()
        whole = whole or counter.get_total_flops()
        tolerance = 1e-9 if candidate.k in (None, 0, 5, 6) else 0.03  # some are measured
        assert candidate.cost == pytest.approx(counter.get_total_flops() / whole, abs=tolerance)


def test_time_as_cost_orders_the_cuts_as_multiply_adds_do():
    cut = cut_of(make(n=3), cost="time")
    assert all(candidate.cost > 0 for candidate in cut.candidates)


def test_the_smaller_of_two_times_counts(monkeypatch):
    clock = iter([0.0, 5.0, 5.0, 8.0])
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
    assert costs._seconds(lambda: None, ())[0] == 3.0


def test_nothing_to_count_is_an_error():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return x * self.weight

    def loss(model, batch):
        return model(batch.float()).square().mean()

    model = nn.Sequential(Scale(), Scale())
    with pytest.raises(ValueError, match=r"no multiply-adds were seen.*cost='time'"):
        choose_cut(model, loss, batches())
    assert choose_cut(model, loss, batches(), cost="time").n_blocks == 2
    blocks = nn.Sequential(*[Scale() for _ in range(6)])
    with_head = nn.Sequential(blocks, nn.Linear(6, 2))
    assert choose_cut(with_head, loss, batches()).candidates[-1].cost < 1


def test_complex_tensors_are_probed():
    model = make()
    model.phase = nn.Parameter(torch.ones(6, dtype=torch.complex64))
    cut = choose_cut(model, lambda m, b: loss_of(m, b) + (m.phase - 1j).abs().sum(), batches())
    assert math.isfinite(cut.gains[-1]) and cut.gains[-1] > 0.5


# The choice


def gains_of(*means, n=12, noise=0.01):
    """Gains of `n` batches without a cut and above each, of parts with these means."""
    generator = random.Random(0)
    rows = [[mean + generator.gauss(0, noise) for mean in means] for _ in range(n)]
    return {
        None if k == 0 else k - 1: [math.fsum(row[k:]) for row in rows] for k in range(len(means))
    }


def candidates_of(gains):
    costs = {None: 1, 0: 0.9, 1: 0.6, 2: 0.4}
    return [choose._candidate(gains, k, cost) for k, cost in costs.items()]


def test_the_best_ratio_is_chosen_with_its_standard_error():
    gains = gains_of(0.02, 0.05, 0.05, 0.9)
    candidates = candidates_of(gains)
    assert [round(x.gain, 1) for x in candidates] == [1.0, 1.0, 0.9, 0.9]
    assert choose._choice(candidates, gains[None])[0] == 2
    assert 0 < candidates[-1].error < 0.1


def test_the_standard_error_is_that_of_a_mean_where_every_batch_gains_the_same():
    shares = [0.1, 0.4, 0.2, 0.5, 0.3]
    candidate = choose._candidate({None: [1.0] * 5, 0: shares}, 0, 0.5)
    assert candidate.ratio == pytest.approx(statistics.mean(shares) / 0.5)
    assert candidate.error == pytest.approx(statistics.stdev(shares) / math.sqrt(5) / 0.5)
    assert math.isnan(choose._candidate({None: [0.0] * 4, 0: [0.0] * 4}, 0, 1.0).ratio)


def two_candidates(cost, gain, ratio, error):
    return [Candidate(None, 1, 1, 1, 0), Candidate(0, cost, gain, ratio, error)]


EVEN, CLEAR = gains_of(0.4, 0.2, 0.2, 0.2), gains_of(1.0)[None]
NO_CUT = {
    "even": (candidates_of(EVEN), EVEN[None], "loses more of the gain"),
    "close": (two_candidates(0.9, 0.85, 1.06, 0.07), CLEAR, "within the standard error"),
    "unknown": (two_candidates(0.9, 0.85, 1.06, math.nan), CLEAR, "within the standard error"),
    "noise": (two_candidates(2, 1, 2, 0), gains_of(0.0)[None], "nothing beyond its noise"),
    "up and down": (two_candidates(2, 1, 2, 0), [1.0, -0.9] * 2, "nothing beyond its noise"),
}


@pytest.mark.parametrize(("candidates", "gains", "expected"), NO_CUT.values(), ids=NO_CUT)
def test_no_cut_unless_it_is_better_beyond_its_standard_error(candidates, gains, expected):
    k, reason = choose._choice(candidates, gains)
    assert k is None and expected in reason


@pytest.mark.parametrize(("part", "expected"), [("head", 4), ("embed", None)])
def test_a_task_that_the_head_learns_is_cut_and_one_that_needs_the_embedding_is_not(part, expected):
    """A new head on features that tell the classes apart; and features that do not exist yet."""

    def loss(model, batch):
        return F.cross_entropy(model(batch[:, :1].expand(-1, 6)), batch[:, 0])

    model = make(seed=1)
    nn.init.zeros_(getattr(model, part).weight)
    assert choose_cut(model, loss, batches()).k == expected


# Applying it


def test_a_cut_stops_the_backward_pass_and_the_optimizer_gets_the_rest(tmp_path):
    model = make()
    cut = cut_of(model).at(2)
    loss_of(model, batches()[0]).backward()
    names = cut.apply(model)
    assert all(p.requires_grad == (p.grad is not None) for p in model.parameters())
    assert set(names) == {n for n, p in model.named_parameters() if not p.requires_grad}
    assert set(names) == {*BELOW, *(n for n in names if n.startswith(("layers.0.", "layers.1.")))}
    inputs = []
    model.layers[2].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    loss_of(model, batches()[0]).backward()
    assert not inputs[0].requires_grad
    groups = grades_param_groups(model, tau=0.0)
    trained = {name for group in groups for name, _ in group["params"]}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    opt = GradESAdamW(groups, lr=1e-3, total_steps=4)
    opt.step()
    assert all(name.startswith(("layers.2.", "layers.3.")) for name in opt.monitored_units)
    report = opt.report(cut)
    assert (
        cut.summary() in str(report)
        and FreezeReport.load(report.save(tmp_path / "r.json")) == report
    )


def test_no_cut_freezes_nothing():
    model = make()
    cut = cut_of(model).at(None)
    assert cut.apply(model) == [] and all(p.requires_grad for p in model.parameters())
    assert cut.frozen == ()
    assert cut.summary() == "no cut: everything trains"


@pytest.mark.parametrize("eval_frozen", [False, True])
def test_dropout_below_the_cut_follows_eval_frozen(eval_frozen):
    model = make(dropout=0.5)
    cut_of(model).at(2).apply(model, eval_frozen=eval_frozen)
    for _ in range(2):
        model.train()
        loss_of(model, batches()[0])
        modes = [layer.dropout.training for layer in model.layers]
        assert modes == [not eval_frozen, not eval_frozen, True, True]
    pickle.loads(pickle.dumps(copy.deepcopy(model)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"dim": 8}, r"'position' has shape \(6, 12\).*choose_cut"),
        ({"n": 5}, r"with 4 blocks in 'layers'; Model has 5"),
        ({"tied": True}, r"'head.weight' has shape \(9, 12\) there, in Model it is nothing"),
    ],
    ids=["width", "depth", "missing"],
)
def test_a_cut_for_another_model_changes_nothing(other, message):
    cut, model = cut_of(), make(**other)
    with pytest.raises(ValueError, match=message):
        cut.at(2).apply(model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="k=9 is no candidate"):
        cut.at(9)


def test_a_cut_can_be_pickled_printed_drawn_and_written(tmp_path):
    cut = cut_of().at(1)
    assert pickle.loads(pickle.dumps(cut)) == cut
    assert "<- chosen" in str(cut) and "above the blocks" in str(cut)
    assert cut.to_dict()["k"] == 1 and len(cut.to_dict()["gains"]) == 6
    assert cut.plot(tmp_path / "cut").stat().st_size > 0
    assert Cut.load(cut.save(tmp_path / "deep" / "cut.json")) == cut
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json' is not a cut"):
        Cut.load(tmp_path / "other.json")


def test_peft_adapters_below_the_cut_are_inactive_and_inputs_need_no_gradient():
    peft = pytest.importorskip("peft")
    base = tiny_llama(num_hidden_layers=3)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()  # and so does get_peft_model, by a second hook
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))

    def hooks():
        return list(base.get_input_embeddings()._forward_hooks.values())

    before = hooks()
    assert len(before) >= 2
    cut = choose_cut(model, language_loss, batches())
    assert hooks() == before
    assert [x.k for x in cut.candidates] == [None, 1, 2]  # nothing trains below or above the blocks
    assert all(gain != 0 for gain in cut.gains[1:4])  # of B, while A has no gradient
    cut.at(2).apply(model)
    assert hooks() == []
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert [m.active_adapters for m in layers] == [[]] * 4 + [["default"]] * 2
    for _ in range(2):
        language_loss(model, batches()[0]).backward()
        trained = [name for name, p in model.named_parameters() if p.grad is not None]
        assert trained and all(".layers.2." in name for name in trained)
        with model.disable_adapter():  # as the reference of DPO: it asks for gradients on its exit
            pass


def test_peft_adapters_below_the_cut_that_were_trained_before_stay_active():
    peft = pytest.importorskip("peft")
    own = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama(num_hidden_layers=3), own)
    cut = choose_cut(model, language_loss, batches())
    before = language_loss(model, batches()[0])
    cut.at(2).apply(model)
    assert torch.equal(language_loss(model, batches()[0]), before)


def recompute(reentrant):
    return functools.partial(checkpoint, use_reentrant=reentrant)


def test_a_cut_is_not_applied_under_reentrant_checkpointing_of_transformers():
    pytest.importorskip("transformers")
    model = tiny_llama(num_hidden_layers=3)
    cut = choose_cut(model, language_loss, batches()).at(1)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"Cut\.apply: with reentrant.*use_reentrant"):
        cut.apply(model)
    assert all(p.requires_grad for p in model.parameters())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert cut.apply(model)


def test_autocast_is_the_callers():
    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(model, batch)

    within = choose_cut(make(), loss, batches())
    assert within.candidates[0].k is None
    with torch.autocast("cpu", dtype=torch.bfloat16):  # it keeps cast weights as long as it lasts
        around = choose_cut(make(), loss_of, batches())
    assert sum(around.gains) > 0.1 and (around.k, around.gains) == (within.k, within.gains)


def test_the_trainer_probes_in_the_precision_of_the_training(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from grades_kernels.integrations.transformers import add_grades

    model, seen = tiny_llama(), set()
    handle = model.model.layers[0].mlp.gate_proj.register_forward_hook(
        lambda _, args, output: seen.add(output.dtype)
    )
    args = transformers.TrainingArguments(output_dir=str(tmp_path), bf16=True, **TRAINER)
    data = [{"input_ids": x, "labels": x} for x in torch.arange(64).remainder(32).reshape(16, 4)]
    add_grades(transformers.Trainer(model, args, train_dataset=data), tau=0.0, cut="auto")
    handle.remove()
    assert seen == {torch.bfloat16}


def test_lightning_does_not_probe_a_step_that_the_module_takes_itself():
    lightning = pytest.importorskip("lightning")
    from grades_kernels.integrations.lightning import GradESCallback

    module = lightning.LightningModule()
    module.automatic_optimization = False
    trainer = types.SimpleNamespace(strategy=None)
    with pytest.raises(ValueError, match=r"automatic_optimization=False.*choose_cut"):
        GradESCallback("auto").setup(trainer, module, "fit")


# Bad input


def late(change):
    """The loss, changed for the batches that measure the trial steps."""
    return lambda m, b: loss_of(m, b) if torch.is_grad_enabled() else change(loss_of(m, b))


BAD = {
    "betas": ({"betas": (1.0, 0.999)}, loss_of, batches(), "Invalid betas"),
    "eps": ({"eps": -1.0}, loss_of, batches(), "Invalid eps"),
    "no batches": ({}, loss_of, [], r"batches: 0 instead of n_batches=12"),
    "few batches": ({}, loss_of, batches(3), r"batches: 3 instead of n_batches=12"),
    "few probes": ({"n_batches": 2}, loss_of, batches(), r"Invalid n_batches: 2"),
    "tied": ({"tied": "x"}, loss_of, batches(), r"Invalid tied: 'x'"),
    "cost": ({"cost": "x"}, loss_of, batches(), r"Invalid cost: 'x'"),
    "vector": ({}, lambda m, b: m(b).sum(1), batches(), r"scalar tensor; batch 1 gave \(8,\)"),
    "number": ({}, lambda m, b: 1.0, batches(), "scalar tensor; batch 1 gave float"),
    "NaN": ({}, lambda m, b: loss_of(m, b) * math.nan, batches(), r"of batch 1 is nan"),
    "late vector": ({}, late(lambda loss: loss.expand(3)), batches(), r"batch 9 gave \(3,\)"),
    "late NaN": ({}, late(lambda loss: loss * math.nan), batches(), "nan.* of the last batches"),
    "detached": ({}, lambda m, b: loss_of(m, b).detach(), batches(), "no tensor that trains"),
    "head alone": ({}, lambda m, b: m.head.weight.sum(), batches(), "depend on the blocks"),
    "not detached": (
        {}, loss_of, [torch.ones(8, 6, requires_grad=True) * 2], r"batch 1 cannot be copied.*detach"
    ),
    "a lock": ({}, loss_of, [threading.Lock()], "batch 1 cannot be copied.*pickle"),
    "infinite gradient": (
        {}, lambda m, b: (m(b) * 0).abs().sqrt().sum(), batches(), "is not finite in batch 1"
    ),
}  # fmt: skip


def assert_refused(model, message, loss=loss_of, given=None, **options):
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        choose_cut(model, loss, batches() if given is None else given, **options)
    assert differences(before, bits(model)) == []


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_and_changes_nothing(name):
    options, loss, given, message = BAD[name]
    assert_refused(make(), message, loss, given, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (recompute(reentrant=True), r"reentrant.* checkpointing.*use_reentrant=False"),
        (Recomputed.apply, r"reentrant.* checkpointing.*use_reentrant=False"),
        (lambda block, x: block.forward(x), "not called as modules"),
    ],
    ids=["reentrant", "by hand", "forward"],
)
def test_blocks_whose_passes_cannot_be_followed_are_refused(call, message):
    assert_refused(make(call=call), message)


def test_finite_gradients_whose_norm_overflows_are_no_error():
    """The gain of AdamW's step, relative to others, does not depend on the scale of the loss."""
    model, scale = make(), 6e19
    (loss_of(model, batches()[0]) * scale).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert any(grad.norm().isinf() and grad.isfinite().all() for grad in grads)
    model.zero_grad()
    cut = choose_cut(model, lambda m, b: loss_of(m, b) * scale, batches())
    assert cut.k == cut_of().k


def test_a_trial_that_leaves_its_weights_would_be_noticed(monkeypatch):
    """Negative control: without copies nothing brings the weights back."""
    model = make()
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    monkeypatch.setattr(torch.Tensor, "clone", lambda x: x)
    choose_cut(model, loss_of, batches())
    assert any((p.detach().numpy() != before[n]).any() for n, p in model.named_parameters())


# Several processes


def cut_in_a_job(kind):
    """The cut that this rank gets from its half of every batch, and the model after it."""
    inner = model = make(dim=16)
    # bits() of a wrapped model would compare DTensors and reducers, which may differ.
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if kind in ("ddp", "ddp in fabric"):
        model = DistributedDataParallel(model)
        if kind == "ddp in fabric":
            model = in_fabric(model)
    elif kind == "fsdp2":
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    half, calls = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4), []

    def failing(model, batch):
        calls.append(batch)
        return loss_of(model, batch).expand(3 if len(calls) > 20 else ())

    with pytest.raises(ValueError, match=r"gave \(3,\)"):  # after trials with other weights
        choose_cut(model, failing, [batch[half] for batch in batches()])
    cut = choose_cut(model, loss_of, [batch[half] for batch in batches()])
    for name, p in inner.named_parameters():
        whole = p.full_tensor() if kind == "fsdp2" else p
        assert torch.equal(whole, before[name]) and p.grad is None
    if kind in ("ddp", "ddp in fabric"):
        with pytest.raises(ValueError, match=r"would wait for the gradients.*model\.module"):
            cut.at(2).apply(model)
    cut.at(2).apply(inner)
    if kind == "ddp":
        model = DistributedDataParallel(inner)
    optimizer = GradESAdamW([p for p in inner.parameters() if p.requires_grad], lr=0.01)
    loss_of(model, batches()[0][half]).backward()
    optimizer.step()
    moved = []
    for name, p in inner.named_parameters():
        whole = p.full_tensor() if kind == "fsdp2" else p
        moved += [] if torch.equal(whole, before[name]) else [name]
    assert not set(moved) & set(cut.at(2).frozen) and moved
    return cut


@pytest.mark.parametrize("kind", ["ddp", "ddp in fabric", "fsdp2", "not wrapped"])
def test_the_ranks_choose_the_cut_of_one_process_with_the_whole_batch(kind):
    if kind == "ddp in fabric":
        pytest.importorskip("lightning")
    first, second = ranks.run(2, cut_in_a_job, kind)
    alone = cut_of(make(dim=16))
    assert first == second
    assert (first.k, first.stack, first.segments) == (alone.k, alone.stack, alone.segments)
    for got, expected in zip(first.candidates, alone.candidates, strict=True):
        assert got.gain == pytest.approx(expected.gain, rel=1e-3)
        assert got.cost == pytest.approx(expected.cost, rel=1e-3)


@ranks.on_ranks(2)
def test_the_ranks_have_the_times_of_one_of_them():
    """Their own would differ, and with them perhaps the cuts."""
    costs = [candidate.cost for candidate in cut_of(make(n=2), cost="time").candidates]
    assert ranks.gathered(costs) == [costs] * 2


# Activations of the frozen prefix


def cached(model, k=2, **options):
    cut = cut_of(model).at(k)
    cut.apply(model, eval_frozen=True)
    return ActivationCache(model, cut, **{"max_bytes": 1e6, **options})


def assert_not_cached(model, cache, message, ids=range(8), length=6, loss=loss_of):
    """A forward pass is an error where the cache would store or read these rows."""
    with pytest.raises(ValueError, match=message), cache.rows(ids):
        loss(model, batches()[0][:, :length])


def train_epochs(model, cache, n=3):
    """Losses of three epochs in another order each, and how often the lowest block computed."""
    optimizer = GradESAdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    runs, losses = [], []
    handle = model.layers[0].fc1.register_forward_pre_hook(lambda *_: runs.append(1))
    data = torch.cat(batches(4))
    for epoch in range(n):
        order = torch.randperm(32, generator=torch.Generator().manual_seed(epoch))
        torch.manual_seed(epoch)
        for ids in order.split(8):
            model.train()
            with cache.rows(ids) if cache else contextlib.nullcontext():
                loss = loss_of(model, data[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    handle.remove()
    return losses, len(runs)


def two_epochs(model, cache):
    """The losses of one batch in two epochs, the second from the cache."""
    losses = []
    for _ in range(2):
        with cache.rows(range(8)):
            losses.append(loss_of(model, batches()[0]).item())
    return losses


def with_cut(**options):
    model = make(**options)
    cut_of(model).at(2).apply(model, eval_frozen=True)
    return model


def test_later_epochs_skip_the_frozen_blocks_with_the_same_bits():
    model, other = make(dropout=0.2), with_cut(dropout=0.2)
    cache = cached(model)
    with_cache, runs = train_epochs(model, cache)
    without, all_runs = train_epochs(other, None)
    assert with_cache == without and (runs, all_runs) == (4, 12)
    assert cache.n_skipped == 8 and cache.n_bytes == 32 * 6 * 12 * 4
    assert "forward" not in model.layers[0].__dict__
    assert_same_weights(model, other)


def test_rows_in_half_precision_and_beyond_the_limit():
    expected = train_epochs(with_cut(), None)[0]
    model = make()
    cache = cached(model, dtype=torch.bfloat16)
    half, runs = train_epochs(model, cache)
    assert runs == 4 and half == pytest.approx(expected, rel=0.02)
    assert cache.n_bytes == 32 * 6 * 12 * 2
    model = make()
    small = cached(model, max_bytes=6 * 12 * 4 * 20)
    assert train_epochs(model, small)[0] == expected
    assert small.n_bytes == small.max_bytes


@pytest.mark.parametrize("case", ["checkpointing", "all blocks", "partly frozen", "own forward"])
def test_the_cache_gives_the_same_bits(case):
    """With recomputed blocks; with the head alone; with blocks that were frozen before."""

    def start():
        model = make(call=recompute(reentrant=False) if case == "checkpointing" else call)
        if case == "partly frozen":
            model.layers[0].requires_grad_(False)
        if case == "own forward":
            model.layers[1].forward = model.layers[1].forward
        return model

    model, other, k = start(), start(), 4 if case == "all blocks" else 2
    cache = cached(model, k)
    cut_of(other).at(k).apply(other, eval_frozen=True)
    assert train_epochs(model, cache)[0] == train_epochs(other, None)[0]
    assert cache.n_skipped == 8
    assert ("forward" in model.layers[1].__dict__) == (case == "own forward")
    assert_same_weights(model, other)


def test_numbers_of_rows_may_be_tensors():
    model = make(call=recompute(reentrant=False))
    cache = cached(model)
    for _ in range(2):
        with cache.rows(list(torch.arange(8))):
            loss_of(model, batches()[0]).backward()  # runs the upper blocks again
    assert cache.n_skipped == 1
    with cache.rows(range(4, 12)):
        loss_of(model, batches()[0])
    assert cache.n_bytes == 12 * 6 * 12 * 4
    stored = sum(row.untyped_storage().nbytes() for row in cache._rows.values())
    assert stored == cache.n_bytes  # rows do not keep their batch


CHANGING = {
    "tied": ({"tied": True}, loss_of, r"tensor that trains.*tied='freeze'"),
    "torch": ({}, lambda m, b: loss_of(m, b + 0 * torch.randint(2, ())), "random numbers were"),
    "Python": ({}, lambda m, b: loss_of(m, b + int(random.random())), "random numbers were"),
    "NumPy": ({}, lambda m, b: loss_of(m, b + int(np.random.rand())), "random numbers were"),
    "twice": ({}, lambda m, b: loss_of(m, b) + loss_of(m, b), "runs twice"),
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_between_epochs_is_not_cached(name):
    options, loss, message = CHANGING[name]
    model = make(**options)
    assert_not_cached(model, cached(model), message, loss=loss)


def test_blocks_may_return_their_output_in_a_tuple_but_no_more():
    class Tuple(Block):
        n_outputs = 1

        def forward(self, x):
            return (super().forward(x),) * self.n_outputs

    model = make(call=lambda block, x: block(x)[0])
    model.layers = nn.ModuleList(Tuple(12) for _ in range(4))
    cache = cached(model)
    first, second = two_epochs(model, cache)
    assert first == second and cache.n_skipped == 1
    Tuple.n_outputs = 2
    assert_not_cached(model, cache, "returns more than", range(8, 16))


def assign(fc):
    fc.load_state_dict({name: x.clone() for name, x in fc.state_dict().items()}, assign=True)


def add(fc):
    fc.scale = nn.Parameter(torch.ones(1), requires_grad=False)


@pytest.mark.parametrize(
    ("spoil", "later", "message"),
    [
        (lambda fc: fc.register_forward_hook(lambda *_: None), False, "hooks inside of Block"),
        (lambda fc: fc.register_forward_hook(lambda *_: None), True, "hooks inside of Block"),
        (lambda fc: nn.init.zeros_(fc.weight), False, "weights below the cut have changed"),
        (lambda fc: nn.init.zeros_(fc.weight), True, "weights below the cut have changed"),
        (lambda fc: fc.requires_grad_(True), False, "have changed or train again"),
        (assign, True, "weights below the cut have changed"),
        (add, True, "weights below the cut have changed"),
        (lambda fc: fc.double(), True, "weights below the cut have changed"),
    ],
    ids=["hook", "hook later", "weight", "base weight later", "trains", "assign", "add", "cast"],
)
def test_a_cache_of_other_weights_or_with_hooks_below_is_refused(spoil, later, message):
    """Before rows are stored, and after; base weights are not frozen by a cut."""
    model = make()
    model.layers[0].fc1.requires_grad_(not later)
    cache = cached(model)
    if later:
        two_epochs(model, cache)
    spoil(model.layers[0].fc1)
    assert_not_cached(model, cache, message)


def test_offloaded_weights_are_no_others():
    """Accelerate leaves a tensor on the meta device in place of each between two passes."""
    model = make()
    cache = cached(model)
    losses = two_epochs(model, cache)
    fc = model.layers[0].fc1
    for name, p in list(fc.named_parameters()):
        setattr(fc, name, nn.Parameter(p.to("meta"), requires_grad=False))
    assert two_epochs(model, cache) == losses and cache.n_skipped == 3


@pytest.mark.parametrize("evaluated_before", [False, True])
@ranks.on_ranks(2)
def test_a_cache_under_fsdp2(evaluated_before):
    """It puts whole tensors in place of the shards at times, which are no other weights."""
    model = make()
    cut = cut_of(model).at(2)
    cut.apply(model, eval_frozen=True)
    for block in model.layers:
        fully_shard(block, reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=False)
    if evaluated_before:
        with torch.no_grad():
            loss_of(model, batches()[0])
    cache = ActivationCache(model, cut, max_bytes=1e6)
    losses = []
    for _ in range(3):
        with cache.rows(range(8)):
            loss = loss_of(model, batches()[0])
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1] == losses[2] and cache.n_skipped == 2
    if not evaluated_before:
        assign(model)
        assert_not_cached(model, cache, "weights below the cut have changed")


def test_a_weight_that_a_higher_block_shares_is_named():
    model = make()
    model.layers[0].fc1.weight = model.layers[3].fc1.weight
    assert_not_cached(model, cached(model), "'fc1.weight' of a frozen block trains")


def test_what_cannot_be_cached_is_refused():
    model = make(dropout=0.1)
    cut = cut_of(model)
    for k in (0, None):
        with pytest.raises(ValueError, match="the cut freezes 0 of 4 blocks"):
            ActivationCache(model, cut.at(k), max_bytes=1)
    for other in (nn.Linear(2, 2), model):
        with pytest.raises(ValueError, match="tensors below the cut still train"):
            ActivationCache(other, cut.at(2), max_bytes=1)
    cut.at(2).apply(model)
    cache = ActivationCache(model, cut.at(2), max_bytes=1e6)
    assert_not_cached(model, cache, r"frozen block is in training mode.*eval_frozen=True")
    model = make()
    cache = cached(model)
    for n in (3, 0):
        assert_not_cached(model, cache, f"{n} ids for 8 rows", range(n))
    with cache.rows(range(8)):
        loss_of(model, batches()[0])
    assert_not_cached(model, cache, r"7 ids for rows of shape \(8, 6, 12\)", range(7))
    assert "forward" not in model.layers[0].__dict__


def test_a_row_of_another_length_is_refused():
    model = make()
    model.position = nn.Parameter(torch.zeros(1, 12))
    cache = cached(model)
    two_epochs(model, cache)
    assert_not_cached(model, cache, "stored with another length", length=4)


class Shortens(nn.Module):
    """A block that returns one token less than it gets."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)[:, :-1]


def test_a_cache_refuses_blocks_that_change_the_shape_in_the_first_pass():
    model = make()
    model.layers = nn.ModuleList(map(Shortens, model.layers))
    assert_not_cached(model, cached(model), "hidden states of another shape")


def test_a_cache_is_not_silent_where_code_does_not_call_the_blocks_as_modules():
    """As code that torch.compile has made before the hooks were set."""
    model = make()
    cache = cached(model)
    calls = [layer.forward for layer in model.layers]
    model.through_blocks = lambda x: functools.reduce(lambda x, call: call(x), calls, x)
    assert_not_cached(model, cache, "0 of 2 frozen blocks were called as modules")


# Mistakes of users


class TwoTasks(Model):
    """The second head is used for every other batch."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(12, 9, bias=False)

    def forward(self, tokens):
        x = self.norm(self.through_blocks(self.embed(tokens) + self.position)).mean(1)
        return (self.second if tokens[0, 0] % 2 else self.head)(x)


def test_a_head_that_the_first_batch_does_not_use_is_not_below():
    few = sorted(batches(), key=lambda batch: int(batch[0, 0]) % 2)
    few = [batch for pair in zip(few, few[::-1], strict=True) for batch in pair]
    cut = choose_cut(make(kind=TwoTasks), loss_of, few)
    assert set(cut.at(0).frozen) == set(BELOW)


class Skips(Model):
    """The output of every block is read above the blocks too, as in a U-Net."""

    def through_blocks(self, x):
        outputs = []
        for layer in self.layers:
            outputs.append(x := layer(x))
        return sum(outputs)


def test_a_cache_is_not_silent_where_a_lower_block_is_read_elsewhere():
    model = make(kind=Skips)
    first, second = two_epochs(model, cached(model))
    assert math.isfinite(first) and math.isnan(second)


def test_a_cache_goes_through_the_hooks_of_its_blocks_once():
    model = make()
    model.layers[1].register_forward_hook(lambda block, args, output: output + torch.arange(12.0))
    cache = cached(model)
    first, second = two_epochs(model, cache)
    assert first == second == loss_of(model, batches()[0]).item()
    with pytest.raises(ValueError, match="runs twice"), cache.rows(range(8)):
        loss_of(model, batches()[0])
        loss_of(model, batches()[1])


def test_a_cut_that_cannot_be_written_leaves_the_former_file(tmp_path, monkeypatch):
    cut = cut_of()
    path = cut.save(tmp_path / "cut.json")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        cut.at(1).save(path)
    assert Cut.load(path) == cut and [x.name for x in tmp_path.iterdir()] == ["cut.json"]


def test_a_model_that_is_compiled_in_place_has_the_same_tensors_below():
    model = make()
    model.compile(backend="eager")
    assert cut_of(model, cost="time").segments[0] == cut_of(make()).segments[0]


def test_a_trial_whose_loss_is_not_finite_leads_to_no_cut():
    def loss(model, batch):
        moved = (model.head.weight - start).abs().max() > 0
        return loss_of(model, batch) * (math.nan if moved else 1.0)

    model = make()
    start = model.head.weight.detach().clone()
    cut = choose_cut(model, loss, batches())
    assert cut.k is None and "not finite" in cut.reason and "not finite" in str(cut)


def test_blocks_above_the_cut_stay_in_training_mode():
    """Also those that train nothing, as with adapters in some layers alone."""
    model = make(dropout=0.5)
    model.layers[3].requires_grad_(False)
    cut_of(model).at(1).apply(model, eval_frozen=True)
    loss_of(model.train(), batches()[0])
    assert [layer.training for layer in model.layers] == [False, True, True, True]


class TokensFirst(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
        self.embed, self.encoder = nn.Embedding(50, 16), nn.TransformerEncoder(layer, 4)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x).transpose(0, 1)).mean(0))


@pytest.mark.parametrize(("n_rows", "message"), [(8, "batch_first=False"), (4, "4 ids for 8 rows")])
def test_a_cache_refuses_hidden_states_whose_rows_are_tokens(n_rows, message):
    model = TokensFirst()

    def loss(model, batch):
        return F.cross_entropy(model(batch), batch[:, 0] % 3)

    batches = [torch.randint(50, (n_rows, 8)) for _ in range(4)]
    cut = choose_cut(model, loss, batches, n_batches=4).at(2)
    cut.apply(model, eval_frozen=True)
    cache = ActivationCache(model, cut, max_bytes=1e9)
    with pytest.raises(ValueError, match=message), cache.rows(range(n_rows)):
        loss(model, batches[0])
