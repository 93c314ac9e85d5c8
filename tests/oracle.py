"""A whole GradESAdamW run in numpy float64, written from the definition alone.

The definition (GradES, arXiv 2509.01842, Eq. 1, Eq. 3 and Algorithm 1, with this package's
patience, cooldown, max_frozen and void checks) is given in comments beside the lines that do it.
Nothing here comes from the package: the tests compare two independent readings of one text.
"""

import math
from collections import Counter
from decimal import ROUND_CEILING, Decimal
from typing import NamedTuple

import numpy as np


class Event(NamedTuple):
    """A frozen unit; `unit` is the position in the oracle's list of units."""

    step: int
    unit: int
    statistic: float
    tau: float
    n_elements: int
    decided_at: int


def grace_steps_of(alpha, total_steps):
    """The exact ceiling of alpha * total_steps, alpha being the decimal number that was typed."""
    return int((Decimal(str(alpha)) * total_steps).to_integral_value(ROUND_CEILING))


def units_of(tensors, groups, names=None):
    """Lists of tensor indices that freeze together, in the order of their first tensors.

    Without names every tensor of two or more dimensions in a group with tau is a unit. With names
    (of projection matrices, LoRA pairs, norms and biases only) norms and biases stay out and
    ``lora_A`` joins its ``lora_B``.
    """
    units = {}
    for group in groups:
        for i in group["params"]:
            if group["tau"] is None or tensors[i].size == 0 or np.ndim(tensors[i]) < 2:
                continue
            key = i if names is None else names[i].replace("lora_A", "lora_B")
            units.setdefault(key, []).append(i)
    return list(units.values())


class Oracle:
    """Simulates the optimizer.

    Args:
        tensors: arrays, the parameters' start values.
        groups: dicts with params (indices into tensors), lr, betas, eps, weight_decay, amsgrad,
            maximize, tau (None: plain AdamW), statistic. All of them may be changed between steps.
        units: lists of tensor indices, each inside one group.

    After every `step(grads)` the public attributes are the state: params, exp_avg, exp_avg_sq,
    max_exp_avg_sq, count (per tensor), events, hits, statistics, decided, frozen (per unit).
    `closest` is the smallest relative distance |statistic - tau| / tau of all comparisons so far,
    `measured` has (unit, statistic) of each, `terms` per unit the sum of the absolute terms of
    its last "gain", whose terms cancel, and `seen` counts the cases of each rule.
    """

    def __init__(
        self,
        tensors,
        groups,
        units,
        *,
        grace_steps=None,
        alpha=0.5,
        total_steps=None,
        tau_per="unit",
        check_every=1,
        patience=1,
        freeze_timing="same_step",
        cooldown=0,
        max_frozen=1.0,
    ):
        self.params = [np.array(x, dtype=np.float64) for x in tensors]
        self.groups, self.units = groups, units
        self.grace = grace_steps_of(alpha, total_steps) if grace_steps is None else grace_steps
        self.tau_per, self.check_every, self.patience = tau_per, check_every, patience
        self.next_step, self.cooldown = freeze_timing == "next_step", cooldown
        self.max_frozen = max_frozen
        self.exp_avg = [np.zeros_like(x) for x in self.params]
        self.exp_avg_sq = [np.zeros_like(x) for x in self.params]
        self.max_exp_avg_sq = [np.zeros_like(x) for x in self.params]
        self.count = [0] * len(tensors)
        self.previous = [None] * len(tensors)
        self.group_of = {i: group for group in groups for i in group["params"]}
        self.unit_of = {i: u for u, members in enumerate(units) for i in members}
        self.t = 0
        self.decided = [None] * len(units)
        self.evidence = [(math.nan, math.nan)] * len(units)  # statistic and tau of the decision
        self.frozen = [False] * len(units)
        self.hits = [0] * len(units)
        self.statistics = [math.nan] * len(units)
        self.terms = [0.0] * len(units)
        self.events, self.measured, self.seen, self.closest = [], [], Counter(), math.inf
        self.latest = {}  # measured in this step

    @np.errstate(invalid="ignore")
    def step(self, grads):
        """One optimizer step; a gradient is an array or None."""
        self.t += 1
        t, self.latest = self.t, {}
        grads = [None if g is None else np.array(g, dtype=np.float64) for g in grads]
        undecided = [u for u, s in enumerate(self.decided) if s is None]
        last_update = set()

        # Enough units decided at earlier steps: the rest follows now, measured or not.
        n = len(self.units)
        if undecided and (n - len(undecided)) / n >= self.max_frozen:
            for u in undecided:
                self.decided[u], self.evidence[u] = t, (math.nan, self.tau(u))
                self.seen["max_frozen"] += 1
        # A check happens after the grace period, every check_every steps.
        elif t > self.grace and (t - self.grace - 1) % self.check_every == 0:
            for u in undecided:
                statistic = self.measure(u, grads)
                if statistic is None:  # no evidence, neither for nor against
                    continue
                tau, compared = self.tau(u), max(statistic, 0.0)  # a negative gain is none
                self.statistics[u] = compared
                self.measured.append((u, statistic))
                self.latest[u] = statistic
                if tau > 0:
                    size = max(tau, self.terms[u])
                    self.closest = min(self.closest, abs(statistic - tau) / size)
                if compared < tau:  # never with tau=0
                    self.hits[u] += 1
                else:
                    self.seen["patience reset"] += self.hits[u] > 0
                    self.hits[u] = 0
                if self.hits[u] >= self.patience:
                    self.decided[u], self.evidence[u] = t, (compared, tau)
                    if self.next_step and self.cooldown == 0:
                        last_update.add(u)

        for u, s in enumerate(self.decided):
            if s is not None and not self.frozen[u] and t >= s + self.cooldown:
                self.frozen[u] = True
                n_elements = sum(self.params[i].size for i in self.units[u])
                self.events.append(Event(t, u, *self.evidence[u], n_elements, s))
                self.seen["freeze"] += 1
                self.seen["freeze after cooldown"] += self.cooldown > 0
                self.seen["freeze of a pair"] += len(self.units[u]) > 1
                self.seen["freeze after its last update"] += u in last_update

        for i, g in enumerate(grads):
            u = self.unit_of.get(i)
            frozen = u is not None and self.frozen[u] and u not in last_update
            if g is not None and not frozen:
                self.adamw(i, g, self.lr_factor(i))
        self.previous = grads
        self.seen["all frozen"] += self.all_frozen

    @property
    def all_frozen(self):
        return bool(self.units) and all(self.frozen)

    def tau(self, u):
        return self.group_of[self.units[u][0]]["tau"]

    def measure(self, u, grads):
        """The statistic of a unit, or None where the check is void."""
        members = self.units[u]
        parts, variances, terms = [], [], 0.0
        for i in members:
            g, kind = grads[i], self.group_of[i]["statistic"]
            if g is None:
                return self.void("no gradient")
            if not g.any():  # an idle expert, LoRA's A while B is zero
                return self.void("zero gradient")
            if kind == "change":
                if self.previous[i] is None:
                    return self.void("no previous gradient")
                parts.append(np.abs(g - self.previous[i]).sum())
            elif kind == "norm":
                parts.append(np.abs(g).sum())
            elif kind == "weight_change":
                parts.append(np.abs(self.trial_update(i, g) - self.params[i]).sum())
            elif self.count[i] < (2 if kind == "signal" else 1):
                return self.void("no moment")
            elif kind == "momentum":
                sign = -1.0 if self.group_of[i]["maximize"] else 1.0
                parts.append(np.abs(sign * g - self.exp_avg[i]).sum())
            else:
                beta1, beta2 = self.group_of[i]["betas"]
                power = beta1 ** self.count[i]
                mean = self.exp_avg[i] / (1 - power)
                variance = self.exp_avg_sq[i] / (1 - beta2 ** self.count[i])
                if kind == "gain":
                    sign = -1.0 if self.group_of[i]["maximize"] else 1.0
                    direction = mean / (np.sqrt(variance) + self.group_of[i]["eps"])
                    parts.append((sign * g * direction).sum())
                    terms += np.abs(g * direction).sum()
                else:  # "signal"
                    noise = (1 - beta1) * (1 + power) / ((1 + beta1) * (1 - power))
                    parts.append((mean**2).sum() / noise)
                    variances.append(variance.sum())
        # A moment carries no trace of this gradient yet; an infinite one is no evidence either.
        if not np.isfinite(parts).all() or not all(np.isfinite(grads[i]).all() for i in members):
            return self.void("not finite")
        if kind == "signal":
            if sum(variances) == 0:  # steps, but none with a gradient
                return self.void("not finite")
            return float(sum(parts) / sum(variances))
        if kind == "weight_change" and sum(parts) == 0:
            return self.void("no movement")
        size = 1
        if self.tau_per == "element":
            size = sum(self.params[i].size for i in members)
        self.terms[u] = terms / size
        return float(sum(parts)) / size

    def trial_update(self, i, g):
        """Tensor i as it would be after this step's update; changes nothing."""
        lists = (self.params, self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq, self.count)
        kept = [x[i].copy() if isinstance(x[i], np.ndarray) else x[i] for x in lists]
        self.adamw(i, g, 1.0)
        after = self.params[i]
        for x, old in zip(lists, kept, strict=True):
            x[i] = old
        return after

    def void(self, why):
        self.seen[f"void: {why}"] += 1

    def lr_factor(self, i):
        """The factor on the learning rate of tensor i at this step."""
        if self.cooldown == 0 or not self.units:
            return 1.0
        if i in self.unit_of:
            s = self.decided[self.unit_of[i]]
        else:  # unmonitored tensors cool down with the last unit
            s = max(self.decided) if None not in self.decided else None
            self.seen["unmonitored cools"] += s is not None and self.t > s
        return 1.0 if s is None else max(0.0, 1.0 - (self.t - s) / self.cooldown)

    def adamw(self, i, g, lr_factor):
        """Loshchilov and Hutter's AdamW with torch's conventions for amsgrad and maximize."""
        group = self.group_of[i]
        beta1, beta2 = group["betas"]
        lr = group["lr"] * lr_factor
        g = -g if group["maximize"] else g
        self.count[i] += 1
        self.params[i] *= 1 - lr * group["weight_decay"]
        self.exp_avg[i] = beta1 * self.exp_avg[i] + (1 - beta1) * g
        self.exp_avg_sq[i] = beta2 * self.exp_avg_sq[i] + (1 - beta2) * g * g
        second = self.exp_avg_sq[i]
        if group["amsgrad"]:
            second = self.max_exp_avg_sq[i] = np.maximum(self.max_exp_avg_sq[i], second)
        mean = self.exp_avg[i] / (1 - beta1 ** self.count[i])
        scale = np.sqrt(second / (1 - beta2 ** self.count[i])) + group["eps"]
        self.params[i] -= lr * mean / scale

    def thaw(self, units):
        """Decided units move again: frozen ones as if new, cooling ones with their moments."""
        for u in units:
            if self.decided[u] is None:
                continue
            for i in self.units[u]:
                self.previous[i] = None
                if self.frozen[u]:
                    for moment in (self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq):
                        moment[i] = np.zeros_like(moment[i])
                    self.count[i] = 0
            self.seen["thaw frozen" if self.frozen[u] else "thaw cooling"] += 1
            self.decided[u], self.frozen[u], self.hits[u] = None, False, 0
        self.events = [event for event in self.events if self.frozen[event.unit]]
