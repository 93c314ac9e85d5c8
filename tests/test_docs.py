"""README and documentation: their code runs, their links and names exist, and the site builds.

Every Python block runs as it stands, after the blocks above it on its page. `names_for` adds the
names that the code below a heading takes for granted.
"""

import functools
import os
import re
import types
from importlib.util import find_spec

import pytest
import torch
from harness import ROOT, run_python
from tiny import TRAINER, sentences, tiny_llama
from torch import nn

from grades_kernels import GradESAdamW

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
}


def code_of(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def sections_of(text):
    """Heading -> Python code below it, "" for the part above the first heading of level 2."""
    parts = re.split(r"^##+ (.*)$", "## \n" + text, flags=re.MULTILINE)[1:]
    return {
        heading: "\n".join(blocks)
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
        if (blocks := code_of(text))
    }


class Loss(nn.Module):
    """A model whose call returns its loss."""

    def __init__(self):
        super().__init__()
        self.llama = tiny_llama()

    def forward(self, batch):
        return self.llama(input_ids=batch, labels=batch).loss


def names_for(heading, model, folder):
    """Names that the code below a heading finds, beside those of the headings above it."""
    if heading in ("Transformers and TRL", "Quick start", "In a trainer"):
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        args = transformers.TrainingArguments(
            output_dir=str(folder), **{**TRAINER, "max_steps": 6, "logging_steps": 500}
        )
        own, data = tiny_llama(), sentences(16)
        if heading != "Transformers and TRL":  # other code on the page trains another model
            return {"trainer": transformers.Trainer(model=own, args=args, train_dataset=data)}
        return {"Trainer": transformers.Trainer, "model": own, "args": args, "dataset": data}
    if heading == "Lightning":
        lightning = pytest.importorskip("lightning")
        options = {"accelerator": "cpu", "logger": False, "default_root_dir": folder}
        return {"Trainer": functools.partial(lightning.Trainer, **options)}
    if heading == "Accelerate":
        accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
        return {"accelerator": accelerator, "model": tiny_llama(), "batches": loader()}
    return {}


def loader():
    return torch.utils.data.DataLoader(sentences(8), batch_size=4)


def check_after(heading, names, folder):
    """Check the result of the code below a heading."""
    if heading in ("Transformers and TRL", "Quick start", "In a trainer"):
        assert 3 < names["trainer"].state.global_step <= 6  # it stops when all is frozen
        assert (folder / "grades_report.json").exists()
    if heading == "Quick start":
        n_units = len(names["optimizer"].monitored_units)
        assert len(names["calibration"].unit_taus) == n_units > 0
        assert names["optimizer"].report().grace_steps == 500
    if heading == "Lightning":
        module = pytest.importorskip("lightning").LightningModule()
        module.llama = tiny_llama()
        module.training_step = lambda batch, batch_idx: module.llama(**batch).loss
        module.configure_optimizers = types.MethodType(names["configure_optimizers"], module)
        names["trainer"].fit(module, loader())
        assert names["trainer"].global_step == 6
    if heading == "Accelerate":
        assert names["optimizer"].report().step == 2
    if heading == "An optimizer for each part of a model":
        assert [x.report().step for x in names["optimizers"].optimizers] == [30, 30]
    if heading == "Steps in the backward pass":
        frozen = {name for x in names["optimizers"].values() for name in x.frozen_units}
        assert frozen and all(p.grad is None for p in names["optimizers"])
    if heading == "Save":
        assert set(torch.load("run.pt", weights_only=True)) == {"model", "optimizer"}


def run(page, folder):
    model = Loss()
    names = {"GradESAdamW": GradESAdamW, "torch": torch, "os": os, "model": model}
    names["optimizer"] = GradESAdamW(model.named_parameters(), tau=0.0, grace_steps=0)
    names["batches"] = [row["input_ids"][None] for row in sentences(30)]
    for heading, code in sections_of(PAGES[page]).items():
        names |= names_for(heading, model, folder)
        exec(compile(code, f"{page}, {heading}", "exec"), names)
        check_after(heading, names, folder)


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if code_of(text)])
def test_python_code_runs(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # readers do not set it
    if page == "docs/several-processes.md":
        request.getfixturevalue("one_process")
    run(page, tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_targets_that_a_page_names_exist(page):
    paths = re.findall(r"`((?:grades_kernels|tests|csrc|benchmarks|docs)/[\w/.]*)`", PAGES[page])
    links = re.findall(r"\]\(([\w./-]+)(?:#[\w-]*)?\)", PAGES[page])
    here = (ROOT / page).parent
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert missing | {link for link in links if not (here / link).exists()} == set()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", PAGES[page], re.MULTILINE)) <= targets


def test_the_site_builds_without_a_warning(tmp_path):
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs is not installed")
    done = run_python("-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "max_frozen" in (tmp_path / "api.html").read_text()
