"""The demo's plan, its Llama-shaped transformer over bytes, and its text: Python's own source."""

from __future__ import annotations

import math
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGES = (  # fine-tuning reads these
    "asyncio collections concurrent email html http importlib json logging multiprocessing "
    "unittest urllib wsgiref xml xmlrpc"
)

MIN_STEPS = 60  # with fewer, a threshold would depend on fewer than ten checks


@dataclass(frozen=True)
class Plan:
    """Model and length of the demo's training; most of a step's time is in matrix products."""

    steps: int = 400  # of the fine-tuning, at least MIN_STEPS
    pretraining: float = 2.0  # steps of the pre-training, as a multiple of `steps`
    seed: int = 0  # of the initial weights and of the batches
    device: str = "cpu"
    dim: int = 160
    layers: int = 4
    heads: int = 5
    hidden: int = 448
    batch: int = 8  # sequences in a batch
    length: int = 128  # bytes in a sequence
    windows: int = 64  # sequences in a validation
    pretraining_lr: float = 3e-3  # peaks of the schedules
    lr: float = 6e-4

    @property
    def every(self) -> int:
        """Steps from one validation to the next: 5 %."""
        return self.steps // 20

    @property
    def grace(self) -> int:
        """Last step of the grace period, 30 %. Its second half measures with tau = 0."""
        return 3 * self.steps // 10

    @property
    def cooldown(self) -> int:
        """Steps in which the learning rate of a decided matrix falls to zero."""
        return self.steps // 12


QUICK = Plan(steps=200, dim=96, layers=2, heads=3, hidden=256, length=64)


class Block(nn.Module):
    """A pre-norm layer: attention and SwiGLU, each added to x of shape (batch, length, dim)."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        dim, hidden = plan.dim, plan.hidden
        shapes = {"gate_proj": (dim, hidden), "up_proj": (dim, hidden), "down_proj": (hidden, dim)}
        self.heads = plan.heads
        self.attn_norm = nn.RMSNorm(dim)
        self.attn = nn.ModuleDict({f"{x}_proj": nn.Linear(dim, dim, bias=False) for x in "qkvo"})
        self.mlp_norm = nn.RMSNorm(dim)
        self.mlp = nn.ModuleDict({k: nn.Linear(*shape, bias=False) for k, shape in shapes.items()})

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        y = self.attn_norm(x)
        query, key, value = (
            self.attn[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = rotate(query, rotary), rotate(key, rotary)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attn["o_proj"](y.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary position embedding; `rotary` is cosines and sines, (2, length, head_dim / 2)."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Transformer(nn.Module):
    """A language model over bytes: tokens (batch, length) to logits (batch, length, 256)."""

    rotary: Tensor

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, plan.dim)
        self.layers = nn.ModuleList(Block(plan) for _ in range(plan.layers))
        self.norm = nn.RMSNorm(plan.dim)
        self.lm_head = nn.Linear(plan.dim, 256, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * plan.layers) if into_residual else 1))
        head_dim = plan.dim // plan.heads
        frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(plan.length), frequencies)
        self.register_buffer("rotary", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.rotary)
        return self.lm_head(self.norm(x))


class Text(NamedTuple):
    """A part of the library as uint8 tensors; every eighth file is held out for validation."""

    training: Tensor
    held_out: Tensor


def read_library(part: str, root: str | os.PathLike[str] | None = None) -> Text:
    """The standard library's "modules" (its top folder) or "packages"; `root`: another library."""
    root = Path(root or sysconfig.get_path("stdlib"))
    patterns = ["*.py"] if part == "modules" else [f"{x}/**/*.py" for x in PACKAGES.split()]
    paths = sorted(path for pattern in patterns for path in root.glob(pattern))
    files = [path.read_bytes() for path in paths]
    training, held_out = b"".join(x for i, x in enumerate(files) if i % 8), b"".join(files[::8])
    if min(len(training), len(held_out)) < 10_000:
        raise FileNotFoundError(
            f"{root} has too little source to train on ({len(files)} files for {part!r}): run "
            "the demo with a Python whose standard library is installed as .py files"
        )
    return Text(*(torch.frombuffer(bytearray(x), dtype=torch.uint8) for x in (training, held_out)))


def windows_at(text: Tensor, starts: Tensor, plan: Plan) -> Tensor:
    """Windows of `text` that begin at `starts`: int64 of shape (len(starts), length + 1)."""
    return text[starts[:, None] + torch.arange(plan.length + 1)].long().to(plan.device)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte; `batch` has the shape (batch, length + 1)."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
