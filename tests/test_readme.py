"""The README's code runs as it stands, block by block, under the heading where it is."""

import os
import re
from pathlib import Path

import pytest
import torch
from tiny import sentences, tiny_llama
from torch import nn

from grades_kernels import GradESAdamW

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
HEADINGS = re.split(r"^##+ (.*)$", README, flags=re.MULTILINE)
BLOCKS = {
    heading: "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    for heading, text in zip(HEADINGS[1::2], HEADINGS[2::2], strict=True)
}


def run(heading, **names):
    assert BLOCKS[heading], f"no code under {heading!r}"
    names = {"GradESAdamW": GradESAdamW, "torch": torch, "os": os, **names}
    exec(compile(BLOCKS[heading], f"README.md, {heading}", "exec"), names)
    return names


def test_no_code_is_left_out():
    assert {heading for heading, code in BLOCKS.items() if code} == {
        "Quick start",
        "Transformers, TRL",
        "Lightning",
        "Accelerate",
        "Checkpoints",
        "Validate in your CI",
    }


class Loss(nn.Module):
    """A model whose call returns its loss."""

    def __init__(self):
        super().__init__()
        self.llama = tiny_llama()

    def forward(self, batch):
        return self.llama(input_ids=batch, labels=batch).loss


def test_quick_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    batches = [row["input_ids"][None] for row in sentences(30)]
    names = run("Quick start", model=Loss(), batches=batches)
    assert len(names["calibration"].unit_taus) == 14
    assert names["optimizer"].report().grace_steps == 500
    assert (tmp_path / "report.json").exists()
    assert "Observing only" in capsys.readouterr().out


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, use_cpu=True, report_to=[], save_strategy="no"
    )
    names = run(
        "Transformers, TRL",
        Trainer=transformers.Trainer,
        model=tiny_llama(),
        args=args,
        dataset=sentences(16),
    )
    assert names["trainer"].state.global_step == 6
    assert (tmp_path / "grades_report.json").exists()


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    def trainer(**options):
        return lightning.Trainer(
            accelerator="cpu", default_root_dir=tmp_path, logger=False, **options
        )

    names = run("Lightning", Trainer=trainer)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.llama = tiny_llama()

        def training_step(self, batch, _):
            return self.llama(**batch).loss

    Module.configure_optimizers = names["configure_optimizers"]
    data = torch.utils.data.DataLoader(sentences(8), batch_size=4)
    names["trainer"].fit(Module(), data)
    assert names["trainer"].global_step == 6


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    data = torch.utils.data.DataLoader(sentences(8), batch_size=4)
    accelerator = accelerate.Accelerator(cpu=True)
    names = run("Accelerate", model=tiny_llama(), batches=data, accelerator=accelerator)
    assert names["optimizer"].report().step == 2


def test_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(3, 3)
    run("Checkpoints", model=model, optimizer=GradESAdamW(model.named_parameters()))
    assert set(torch.load("run.pt", weights_only=True)) == {"model", "optimizer"}
    assert not Path("run.tmp").exists()


def test_validate(capsys):
    run("Validate in your CI")
    assert "float32" in capsys.readouterr().out


def test_broken_code_would_be_noticed(monkeypatch):
    """Negative control: a name that the README got wrong is an error here."""
    broken = BLOCKS["Validate in your CI"].replace("assert_matches_reference", "assert_matches")
    monkeypatch.setitem(BLOCKS, "Validate in your CI", broken)
    with pytest.raises(ImportError):
        run("Validate in your CI")
