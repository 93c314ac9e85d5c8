"""Lightning: callback, log, resume and two processes, with real runs against a plain loop."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from grades_kernels import FreezeReport, GradESAdamW
from grades_kernels.integrations import measurements

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from grades_kernels.integrations import lightning as integration  # noqa: E402
from grades_kernels.integrations.lightning import GradESCallback  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("without_pictures"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

EPOCHS, BATCHES, BATCH = 3, 6, 4
# Chosen so that of the three matrices two freeze, one after the other.
OPTIONS = {"tau": 0.047, "tau_per": "element", "alpha": 0.25}


class Regression(lightning.LightningModule):
    """A small network that configures its optimizer as the documentation says."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = {**OPTIONS, **options}
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches
        return GradESAdamW(self.named_parameters(), lr=1e-2, total_steps=steps, **self.options)


def dataset() -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES * BATCH, 8, generator=g)
    return TensorDataset(x, torch.randn(BATCHES * BATCH, 2, generator=g))


def loader() -> DataLoader:
    return DataLoader(dataset(), batch_size=BATCH)


def make_trainer(folder, *callbacks, **changes):
    settings = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": CSVLogger(folder, name="", version=""),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "callbacks": [GradESCallback(), *callbacks],
    }
    return lightning.Trainer(**{**settings, **changes})


def run(folder, *callbacks, resume=None, options=None, **changes):
    trainer = make_trainer(folder, *callbacks, **changes)
    model = Regression(**(options or {}))
    trainer.fit(model, loader(), ckpt_path=resume)
    return trainer, model, trainer.optimizers[0]


def plain_loop(*, accumulate=1, clip=None, **options) -> tuple[nn.Module, GradESAdamW]:
    model = Regression(**options)
    optimizer = GradESAdamW(
        model.named_parameters(),
        lr=1e-2,
        total_steps=EPOCHS * BATCHES // accumulate,
        **model.options,
    )
    for _ in range(EPOCHS):
        for k, (x, y) in enumerate(loader(), start=1):

            def closure(x=x, y=y):
                # Inside of step(), as Lightning does it: what froze in the step before has no
                # gradient any more, and so no part in the norm that is clipped.
                (nn.functional.mse_loss(model.net(x), y) / accumulate).backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)

            if k % accumulate == 0:
                optimizer.step(closure)
                optimizer.zero_grad()
            else:
                closure()
            if optimizer.all_frozen:
                return model, optimizer
    return model, optimizer


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    theirs = dict(b.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in a.named_parameters())


@pytest.mark.parametrize(
    ("changes", "loop", "tau"),
    [
        pytest.param({}, {}, 0.047, id="fp32"),
        pytest.param({"accumulate_grad_batches": 2}, {"accumulate": 2}, 0.034, id="accumulation"),
        pytest.param({"gradient_clip_val": 0.3}, {"clip": 0.3}, 0.0105, id="clipping"),
    ],
)
def test_trainer_freezes_what_a_plain_loop_freezes(tmp_path, changes, loop, tau):
    """Same batches, same events, and bit for bit the same end."""
    _, model, trained = run(tmp_path, options={"tau": tau}, **changes)
    expected, plain = plain_loop(tau=tau, **loop)
    assert trained.freeze_events and not trained.all_frozen  # the comparison has something to say
    assert trained.freeze_events == plain.freeze_events
    ours, theirs = trained.report().to_dict(), plain.report().to_dict()
    assert ours["history"] == theirs["history"]
    assert_same_weights(model, expected)


def test_another_threshold_is_noticed(tmp_path):
    """Negative control of the comparison above."""
    _, _, trained = run(tmp_path)
    _, plain = plain_loop(tau=0.5 * OPTIONS["tau"])
    assert trained.freeze_events != plain.freeze_events


def read_log(folder) -> list[dict[str, str]]:
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["grades/frozen_share"]]


def test_stops_and_logs_when_all_is_frozen(tmp_path, picture):
    """The run ends in the step in which all is frozen; log and files tell of it."""
    trainer, _, optimizer = run(tmp_path, options={"max_frozen": 0.3}, log_every_n_steps=2)
    last = max(event.step for event in optimizer.freeze_events)
    assert optimizer.all_frozen and trainer.global_step == last < EPOCHS * BATCHES
    rows = read_log(tmp_path)
    assert [int(row["step"]) for row in rows] == sorted({*range(2, last, 2), last})
    assert float(rows[0]["grades/frozen_share"]) == 0
    for name, value in measurements(optimizer).items():
        assert float(rows[-1][name]) == pytest.approx(value)
    assert float(rows[-1]["grades/frozen_share"]) == 1
    assert FreezeReport.load(tmp_path / "grades_report.json") == optimizer.report()
    assert (tmp_path / "grades_report.png").stat().st_size > 0


def test_runs_to_the_end_if_nobody_stops_it(tmp_path, monkeypatch):
    """Negative control: it is the callback that stops the run above."""
    monkeypatch.setattr(integration, "is_finished", lambda optimizer: False)
    trainer, _, optimizer = run(tmp_path, options={"max_frozen": 0.3})
    assert optimizer.all_frozen and trainer.global_step == EPOCHS * BATCHES


def test_resume_is_bit_identical(tmp_path):
    """From the checkpoint of every epoch, the same end."""
    keep = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1)
    _, expected, whole = run(tmp_path, keep, enable_checkpointing=True)
    for epoch in range(EPOCHS - 1):
        folder = tmp_path / f"from{epoch}"
        trainer, model, resumed = run(folder, resume=tmp_path / "kept" / f"epoch={epoch}.ckpt")
        assert trainer.global_step == EPOCHS * BATCHES
        assert resumed.freeze_events == whole.freeze_events != []
        assert resumed.report().to_dict()["units"] == whole.report().to_dict()["units"]
        assert_same_weights(model, expected)


class TwoOptimizers(Regression):
    """Manual optimization, one optimizer for each half of the network."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [
            GradESAdamW(self.net[:2].named_parameters(), tau=1e9, grace_steps=1),
            GradESAdamW(self.net[2:].named_parameters(), tau=1e9, grace_steps=3),
        ]


def test_several_optimizers_stop_together(tmp_path):
    """The run goes on until each has frozen all it monitors; numbers and reports are kept apart."""
    trainer = make_trainer(tmp_path)
    trainer.fit(TwoOptimizers(), loader())
    assert trainer.optimizers[0].freeze_events[0].step == 2
    assert trainer.optimizers[1].freeze_events[0].step == 4
    assert trainer.optimizers[0].report().step == 4
    with open(tmp_path / "metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert last["grades/frozen_share/optimizer0"] == last["grades/frozen_share/optimizer1"] == "1.0"
    for k in (0, 1):
        report = FreezeReport.load(tmp_path / f"optimizer{k}" / "grades_report.json")
        assert report == trainer.optimizers[k].report()


class Plain(Regression):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Plain, r"no optimizer .* is a GradESAdamW.*\['AdamW'\]"),
        (lambda: Regression(tau=None), r"monitors something.*\['GradESAdamW'\]"),
    ],
    ids=["AdamW", "tau-None"],
)
def test_a_callback_without_our_optimizer_is_refused_before_the_first_step(
    tmp_path, model, message
):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer.fit(model(), loader())
    assert trainer.global_step == 0


def test_an_endless_run_has_no_length(tmp_path):
    """Lightning estimates infinity; the optimizer says what it needs."""
    trainer = make_trainer(tmp_path, max_epochs=-1)
    with pytest.raises(ValueError, match=r"Invalid total_steps: inf"):
        trainer.fit(Regression(), loader())


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_flat_shards_are_refused_before_the_first_step(tmp_path, monkeypatch, name):
    """Neither can be started on one CPU: an object of that class stands in the trainer's place."""
    strategy = object.__new__(getattr(lightning.strategies, name))
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(type(trainer), "strategy", strategy)
    with pytest.raises(ValueError, match=rf"{name}.*ModelParallelStrategy"):
        GradESCallback().setup(trainer, Regression(), "fit")


DDP = """
import json, os, sys
sys.path.insert(0, {tests!r})
import test_integrations_lightning as here
here.FreezeReport.plot = lambda report, path: path

folder = {folder!r}
trainer, model, optimizer = here.run(
    folder, devices=2, strategy="ddp", use_distributed_sampler=True, options={options!r}
)
found = dict(
    events=[[event.step, event.unit] for event in optimizer.freeze_events],
    statistics=optimizer.statistics(),
    steps=trainer.global_step,
    weights=[p.double().sum().item() for p in model.parameters()],
)
with open(f"{{folder}}/rank{{trainer.global_rank}}.json", "w") as file:
    json.dump(found, file)
"""


def joined_batches():
    """What both ranks together see in every step: Lightning shuffles what it distributes."""
    x, y = dataset().tensors
    for epoch in range(EPOCHS):
        shares = []
        for rank in (0, 1):
            sampler = DistributedSampler(dataset(), 2, rank, shuffle=True, seed=0)
            sampler.set_epoch(epoch)
            shares.append(torch.tensor(list(sampler)).view(-1, BATCH))
        for rows in torch.cat(shares, dim=1):
            yield x[rows], y[rows]


def test_two_processes_decide_and_stop_together(tmp_path):
    """DDP over gloo: the events of a plain loop over the joined batches, on both ranks."""
    options = {"tau": 0.036, "max_frozen": 0.6}
    script = tmp_path / "train.py"
    tests = os.fspath(Path(__file__).parent)
    script.write_text(DDP.format(tests=tests, folder=os.fspath(tmp_path), options=options))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join([os.fspath(Path(tests).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{k}.json").read_text()) for k in (0, 1))
    assert first == second

    model = Regression(**options)
    length = EPOCHS * BATCHES // 2
    optimizer = GradESAdamW(model.named_parameters(), lr=1e-2, total_steps=length, **model.options)
    steps = 0
    for x, y in joined_batches():
        optimizer.zero_grad()
        nn.functional.mse_loss(model.net(x), y).backward()
        optimizer.step()
        steps += 1
        if optimizer.all_frozen:
            break
    assert optimizer.all_frozen and steps < length
    assert first["events"] == [[event.step, event.unit] for event in optimizer.freeze_events]
    assert first["steps"] == steps
    assert first["statistics"] == pytest.approx(optimizer.statistics(), rel=1e-4)
    assert first["weights"] == pytest.approx(
        [p.double().sum().item() for p in model.parameters()], rel=1e-4
    )
    report = FreezeReport.load(tmp_path / "grades_report.json")
    assert [[event.step, event.unit] for event in report.events] == first["events"]
