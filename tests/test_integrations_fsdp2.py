"""The Trainer under FSDP2, on CPU processes: it trains, freezes, saves, and resumes.

Accelerate turns FSDP on for accelerators alone, so the script presents the processes as such.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import ranks
import torch
from tiny import TRAINER, sentences, tiny_llama

from grades_kernels.integrations import unwrap_optimizer

pytest.importorskip("transformers", minversion="5.3")
pytest.importorskip("accelerate")

OPTIONS = {"tau": 0.0095, "tau_per": "element", "alpha": 0.25}


def launch(folder, n=2):
    folder.mkdir(exist_ok=True)
    launcher = f"-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node {n}"
    first, second = ranks.run_script(__file__, folder, *launcher.split())
    assert first == second
    return first


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The outcomes of one job in a whole run, in one resumed from it, and in one with a cut."""
    return launch(tmp_path_factory.mktemp("two"))


@pytest.mark.slow
def test_a_run_freezes_and_resumes_with_the_same_and_another_number_of_processes(runs, tmp_path):
    whole, same = runs["whole"], runs["resumed"]
    assert whole["sharded"] and whole["released"] and whole["events"]
    for key in ("events", "losses"):
        assert same[key] == whole[key][-len(same[key]) :] != [], key
    if "GRADES_DISTRIBUTED_RUNS" in os.environ:  # a minute on two cores
        (tmp_path / "resume").write_text(whole["checkpoint"])
        more = launch(tmp_path, n=4)["resumed"]  # other batches from here on, the same past
        past = [event for event in whole["events"] if event[0] <= 8]
        assert past and more["events"][: len(past)] == past


@pytest.mark.slow
def test_a_chosen_cut_stays_frozen(runs):
    found = runs["cut"]
    assert found["sharded"] and found["cut"] and found["moved"]
    assert not set(found["moved"]) & set(found["cut"])


def trained(folder, resume=None, cut=None, **changes):
    """The outcome of a run in `folder`, resumed from a checkpoint, with a cut or without."""
    import accelerate
    import transformers

    from grades_kernels.integrations.transformers import add_grades

    args = transformers.TrainingArguments(
        str(folder),
        **{**TRAINER, "save_strategy": "steps", "save_steps": 8, **changes},
        fsdp=True,
        fsdp_config={
            "version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    )
    assert args.device.type == "cpu"
    several = accelerate.utils.DistributedType.MULTI_GPU
    accelerate.PartialState._shared_state["distributed_type"] = several
    model, data = tiny_llama(num_hidden_layers=4 if cut else 2), sentences()
    if cut:
        data = sentences(48, words=4)
        torch.nn.init.zeros_(model.lm_head.weight)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = transformers.Trainer(model=model, args=args, train_dataset=data)
    callback = add_grades(trainer, cut=cut, **OPTIONS)
    trainer.train(resume_from_checkpoint=resume)
    optimizer = unwrap_optimizer(trainer.optimizer)
    params = dict(trainer.model.named_parameters())
    return {
        "checkpoint": str(folder / "checkpoint-8"),
        "sharded": all(hasattr(p, "placements") for p in params.values()),
        "released": not all(p.requires_grad for p in params.values()),
        "events": [list(event) for event in optimizer.freeze_events],
        "losses": [x["loss"] for x in trainer.state.log_history if "loss" in x],
        "cut": callback.cut and callback.cut.frozen,
        "moved": [n for n, p in params.items() if not torch.equal(p.full_tensor(), start[n])],
    }


def main(folder):
    """The runs of a job: those of two ranks, or the one whose checkpoint `folder` names."""
    resume = folder / "resume"
    if resume.exists():
        found = {"resumed": trained(folder / "resumed", resume=resume.read_text())}
    else:
        found = {"whole": trained(folder / "whole")}
        checkpoint = found["whole"]["checkpoint"]
        found["resumed"] = trained(folder / "resumed", resume=checkpoint)
        # As short as it can be: two processes that wait for each other are slow on a busy machine.
        found["cut"] = trained(folder / "cut", cut={"n_batches": 6}, max_steps=4)
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    ranks.end_script()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
