"""Runs of a small network in Lightning, compared with a plain loop."""

import csv
import json
import sys

import pytest
import ranks
import torch
from tiny import assert_same_run, assert_same_weights, regression_data, tiny_network
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

from grades_kernels import Cut, FreezeReport, GradESAdamW
from grades_kernels.integrations import measurements

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from torchmetrics import SumMetric  # noqa: E402

from grades_kernels.integrations import lightning as integration  # noqa: E402
from grades_kernels.integrations.lightning import GradESCallback  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("without_plots"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

EPOCHS, BATCHES, BATCH = 3, 6, 4
DATA = regression_data(BATCHES * BATCH)
LOADER = DataLoader(DATA, batch_size=BATCH)
# Chosen so that of the three matrices two freeze, one after the other.
OPTIONS = {"tau": 0.047, "tau_per": "element", "alpha": 0.25}


class Regression(lightning.LightningModule):
    """A small network that configures its optimizer as the documentation shows."""

    def __init__(self, **options):
        super().__init__()
        self.options = {**OPTIONS, **options}
        self.net = tiny_network()

    def loss(self, x, y):
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def make_optimizer(self, steps):
        return GradESAdamW(self.named_parameters(), lr=1e-2, total_steps=steps, **self.options)

    def configure_optimizers(self):
        return self.make_optimizer(self.trainer.estimated_stepping_batches)


def fit(folder, model=None, *callbacks, resume=None, loaders=LOADER, **changes):
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
    trainer = lightning.Trainer(**{**settings, **changes})
    trainer.fit(model or Regression(), loaders, ckpt_path=resume)
    return trainer


class Deep(Regression):
    """Four blocks below a new head; it logs, as a training step does."""

    def __init__(self, **options):
        super().__init__(**options)
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        nn.init.zeros_(self.net[0].weight)

    def training_step(self, batch, batch_idx):
        x, y = batch
        for block in self.blocks:
            x = torch.tanh(block(x))
        loss = self.loss(x, y + 3.0)  # which the last bias learns
        self.log("loss", loss)
        return {"loss": loss}


def test_a_chosen_cut_leaves_no_trace_but_frozen_tensors(tmp_path):
    """The run equals the one that is given the same cut."""
    callback = GradESCallback(cut={"blocks": "blocks"})
    first, second = Deep(), Deep()
    fit(tmp_path / "a", first, callbacks=[callback])
    cut = callback.cut
    assert cut.k is not None and "log" not in first.__dict__
    fit(tmp_path / "b", second, callbacks=[GradESCallback(cut=cut)])
    assert_same_weights(first, second)
    start = dict(Deep().named_parameters())
    for name, p in first.named_parameters():
        assert torch.equal(p, start[name]) == (name in cut.frozen)
    assert Cut.load(tmp_path / "a" / "grades_cut.json") == cut
    report = FreezeReport.load(tmp_path / "a" / "grades_report.json")
    assert report.cut == cut.summary()
    with pytest.raises(ValueError, match="Invalid cut: 'half'"):
        GradESCallback(cut="half")


class Transferred(Deep):
    """Batches are dicts behind a hook; a metric counts examples."""

    def __init__(self, **options):
        super().__init__(**options)
        self.count = SumMetric()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"x": batch[0], "y": batch[1]}

    def training_step(self, batch, batch_idx):
        self.count(len(batch["x"]))
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def test_the_probe_transfers_batches_as_the_run_does_and_resets_metrics(tmp_path):
    counts = []
    for cut in (None, {"blocks": "blocks"}):
        model = Transferred()
        fit(tmp_path / str(cut is None), model, callbacks=[GradESCallback(cut=cut)])
        counts.append(model.count.compute().item())
    assert counts[0] == counts[1] > 0


class Joint(Deep):
    """Its batches come from two loaders."""

    def __init__(self, **options):
        super().__init__(**options)
        self.n_probed = 0

    def training_step(self, batch, batch_idx):
        self.n_probed += self.trainer.global_step == 0
        pair = torch.cat([batch["long"][0], batch["short"][0]])
        return super().training_step((pair, torch.zeros(len(pair), 2)), batch_idx)


def test_a_cut_is_chosen_from_several_loaders_within_an_epoch_of_the_shortest(tmp_path):
    few, one = (DataLoader(Subset(DATA, range(n * BATCH)), batch_size=BATCH) for n in (5, 1))
    n_forward = {}
    for name, own in (("both", {"blocks": "blocks"}), ("5", {"blocks": "blocks", "n_batches": 5})):
        model, callback = Joint(), GradESCallback(cut=own)
        loaders = {"long": LOADER, "short": few}
        fit(tmp_path / name, model, callbacks=[callback], loaders=loaders)
        n_forward[name] = model.n_probed
    assert n_forward["both"] == n_forward["5"] > 5
    loaders = {"long": LOADER, "short": one}
    with pytest.raises(ValueError, match="four batches of different examples, an epoch has 1"):
        fit(tmp_path / "1", Joint(), callbacks=[GradESCallback(cut="auto")], loaders=loaders)


class Late(Deep):
    def configure_model(self):
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def __init__(self, **options):
        super().__init__(**options)
        del self.blocks


def test_blocks_that_configure_model_makes_come_too_late_for_a_cut(tmp_path):
    with pytest.raises(ValueError, match=r"no repeated blocks.*make the blocks in __init__"):
        fit(tmp_path, Late(), callbacks=[GradESCallback(cut="auto")])


def test_a_finished_run_that_is_resumed_takes_no_step(tmp_path):
    first, second = Regression(max_frozen=0.5), Regression(max_frozen=0.5)
    trainer = fit(tmp_path / "a", first)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert 0 < trainer.global_step < EPOCHS * BATCHES
    resumed = fit(tmp_path / "b", second, resume=tmp_path / "last.ckpt")
    assert resumed.global_step == trainer.global_step
    assert_same_weights(first, second)


def plain_loop(*, accumulate=1, clip=None, **options):
    model = Regression(**options)
    optimizer = model.make_optimizer(EPOCHS * BATCHES // accumulate)
    for k, batch in enumerate([batch for _ in range(EPOCHS) for batch in LOADER], start=1):

        def closure(batch=batch):
            # Lightning calls it in step(), after the release of matrices that froze in the step
            # before: these have no gradient any more, and clipping does not count them.
            (model.loss(*batch) / accumulate).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)

        if k % accumulate == 0:
            optimizer.step(closure)
            optimizer.zero_grad()
        else:
            closure()
        if optimizer.all_frozen:
            break
    return model, optimizer


@pytest.mark.parametrize(
    ("changes", "loop", "tau"),
    [
        ({}, {}, 0.047),
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}, 0.034),
        ({"gradient_clip_val": 0.3}, {"clip": 0.3}, 0.0105),
    ],
    ids=["fp32", "accumulation", "clipping"],
)
def test_trainer_equals_a_plain_loop_bit_for_bit(tmp_path, changes, loop, tau):
    model = Regression(tau=tau)
    trained = fit(tmp_path, model, **changes).optimizers[0]
    assert trained.freeze_events and not trained.all_frozen
    assert_same_run((model, trained), plain_loop(tau=tau, **loop))


def read_log(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_trainer_stops_and_logs_when_all_units_are_frozen(tmp_path, plot):
    trainer = fit(tmp_path, Regression(max_frozen=0.3), log_every_n_steps=2)
    (optimizer,) = trainer.optimizers
    last = max(event.step for event in optimizer.freeze_events)
    assert optimizer.all_frozen and trainer.global_step == last < EPOCHS * BATCHES
    rows = [row for row in read_log(tmp_path) if row["grades/frozen_share"]]
    assert [int(row["step"]) for row in rows] == sorted({*range(2, last, 2), last})
    assert float(rows[0]["grades/frozen_share"]) == 0
    assert float(rows[-1]["grades/frozen_share"]) == 1
    for name, value in measurements(optimizer).items():
        assert float(rows[-1][name]) == pytest.approx(value)
    assert FreezeReport.load(tmp_path / "grades_report.json") == optimizer.report()
    assert (tmp_path / "grades_report.png").stat().st_size > 0


def test_accumulated_batches_log_once_per_step(tmp_path):
    fit(tmp_path, Regression(tau=0.0), log_every_n_steps=2, accumulate_grad_batches=3)
    steps = [int(row["step"]) for row in read_log(tmp_path) if row["grades/frozen_share"]]
    assert steps == sorted(set(steps)) and steps[0] == 2


def test_without_the_stop_of_the_callback_the_run_goes_on(tmp_path, monkeypatch):
    """Negative control: no other code stops the run above."""
    monkeypatch.setattr(integration, "is_finished", lambda optimizer: False)
    trainer = fit(tmp_path, Regression(max_frozen=0.3))
    assert trainer.optimizers[0].all_frozen and trainer.global_step == EPOCHS * BATCHES


def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path):
    """From the checkpoint of every epoch."""
    keep = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1)
    expected = Regression()
    (whole,) = fit(tmp_path, expected, keep, enable_checkpointing=True).optimizers
    assert whole.freeze_events
    for epoch in range(EPOCHS - 1):
        model = Regression()
        kept = tmp_path / "kept" / f"epoch={epoch}.ckpt"
        trainer = fit(tmp_path / f"from{epoch}", model, resume=kept)
        assert trainer.global_step == EPOCHS * BATCHES
        assert_same_run((model, trainer.optimizers[0]), (expected, whole), history=False)


class TwoOptimizers(Regression):
    """Manual optimization with one optimizer for each half of the network."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(*batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [
            GradESAdamW(self.net[:2].named_parameters(), tau=1e9, grace_steps=1),
            GradESAdamW(self.net[2:].named_parameters(), tau=1e9, grace_steps=3),
        ]


def test_training_stops_when_every_optimizer_has_frozen_all_its_units(tmp_path):
    """Numbers and reports of the optimizers are logged and saved separately."""
    optimizers = fit(tmp_path, TwoOptimizers()).optimizers
    assert [optimizer.freeze_events[0].step for optimizer in optimizers] == [2, 4]
    last = read_log(tmp_path)[-1]
    for k, optimizer in enumerate(optimizers):
        assert optimizer.report().step == 4
        assert last[f"grades/frozen_share/optimizer{k}"] == "1.0"
        saved = FreezeReport.load(tmp_path / f"optimizer{k}" / "grades_report.json")
        assert saved == optimizer.report()


class Plain(Regression):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize(
    ("make_model", "changes", "message"),
    [
        (Plain, {}, r"no optimizer .* is a GradESAdamW.*\['AdamW'\]"),
        (lambda: Regression(tau=None), {}, r"monitors a unit.*\['GradESAdamW'\]"),
        (Regression, {"max_epochs": -1}, "Invalid total_steps: inf"),  # Lightning's estimate
    ],
    ids=["AdamW", "no-tau", "endless"],
)
def test_a_run_that_cannot_freeze_is_refused_before_the_first_step(
    tmp_path, make_model, changes, message
):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, model, **changes)
    assert_same_weights(model, Regression())


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_flattened_parameters_are_refused_before_the_first_step(monkeypatch, name):
    """Neither can be started on one CPU, so the Trainer gets an object that was not initialised."""
    strategy = object.__new__(getattr(lightning.strategies, name))
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(type(trainer), "strategy", strategy)
    with pytest.raises(ValueError, match=rf"{name}.*ModelParallelStrategy"):
        GradESCallback().setup(trainer, Regression(), "fit")


TWO_RANKS = {"tau": 0.036, "max_frozen": 0.6}


def train_one_rank(folder):
    FreezeReport.plot = lambda report, path: path
    model = Regression(**TWO_RANKS)
    trainer = fit(folder, model, devices=2, strategy="ddp", use_distributed_sampler=True)
    (optimizer,) = trainer.optimizers
    found = {
        "events": [event[:2] for event in optimizer.freeze_events],
        "statistics": optimizer.statistics(),
        "steps": trainer.global_step,
        "weights": [p.double().sum().item() for p in model.parameters()],
        "released": sum(not p.requires_grad for p in model.parameters()),
    }
    with open(f"{folder}/rank{trainer.global_rank}.json", "w") as file:
        json.dump(found, file)


def joined_batches():
    """The batches of both ranks together; Lightning shuffles them."""
    for epoch in range(EPOCHS):
        shares = []
        for rank in (0, 1):
            sampler = DistributedSampler(DATA, 2, rank, shuffle=True, seed=0)
            sampler.set_epoch(epoch)
            shares.append(torch.tensor(list(sampler)).view(-1, BATCH))
        for rows in torch.cat(shares, dim=1):
            yield DATA[rows]


def test_two_ranks_stop_in_the_step_in_which_a_plain_loop_stops(tmp_path):
    """DDP over gloo, compared with a loop over the joined batches."""
    first, second = ranks.run_script(__file__, tmp_path)
    assert first == second

    model = Regression(**TWO_RANKS)
    length = EPOCHS * BATCHES // 2
    optimizer = model.make_optimizer(length)
    for batch in joined_batches():
        optimizer.zero_grad()
        model.loss(*batch).backward()
        optimizer.step()
        if optimizer.all_frozen:
            break
    assert optimizer.all_frozen
    assert first["events"] == [list(event[:2]) for event in optimizer.freeze_events]
    assert first["steps"] == optimizer.report().step < length
    assert first["statistics"] == pytest.approx(optimizer.statistics(), rel=1e-4)
    weights = [p.double().sum().item() for p in model.parameters()]
    assert first["weights"] == pytest.approx(weights, rel=1e-4)
    assert first["released"] == sum(not p.requires_grad for p in model.parameters()) > 0
    report = FreezeReport.load(tmp_path / "grades_report.json")
    assert [list(event[:2]) for event in report.events] == first["events"]


if __name__ == "__main__":
    train_one_rank(sys.argv[1])


class Matrices(Regression):
    """Only the matrices train, and each of them is monitored."""

    def __init__(self, **options):
        super().__init__(**options)
        for p in self.parameters():
            p.requires_grad_(p.dim() > 1)

    def make_optimizer(self, steps):
        return GradESAdamW(
            [p for p in self.parameters() if p.requires_grad], lr=1e-2, grace_steps=2, tau=1e9
        )


def test_where_nothing_is_left_to_train_no_minimum_keeps_the_run_going(tmp_path):
    """A backward pass without anything that needs a gradient is an error."""
    trainer = fit(tmp_path, Matrices(), min_epochs=EPOCHS, min_steps=EPOCHS * BATCHES)
    assert 3 <= trainer.global_step <= 5
