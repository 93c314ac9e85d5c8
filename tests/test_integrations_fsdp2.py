"""The Trainer under FSDP2, on CPU processes: it trains, freezes, saves, and resumes.

Accelerate turns FSDP on for accelerators alone, so the script tells it that it has several.
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

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

OPTIONS = {"tau": 0.0095, "tau_per": "element", "alpha": 0.25}


def launch(folder, n=2):
    folder.mkdir(exist_ok=True)
    launcher = f"-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node {n}"
    first, second = ranks.run_script(__file__, folder, *launcher.split())
    assert first == second
    return first


@pytest.mark.slow
def test_a_run_freezes_and_resumes_with_the_same_and_another_number_of_processes(tmp_path):
    whole = launch(tmp_path / "whole")
    assert whole["sharded"] and whole["released"] and whole["events"]
    (tmp_path / "resume").write_text(str(tmp_path / "whole" / "checkpoint-8"))
    same = launch(tmp_path / "same")
    for key in ("events", "losses"):
        assert same[key] == whole[key][-len(same[key]) :], key
    if "GRADES_DISTRIBUTED_RUNS" in os.environ:  # a minute on two cores
        more = launch(tmp_path / "more", n=4)  # other batches from here on, the same past
        past = [event for event in whole["events"] if event[0] <= 8]
        assert past and more["events"][: len(past)] == past


@pytest.mark.slow
def test_a_chosen_cut_stays_frozen(tmp_path):
    (tmp_path / "cut").touch()
    found = launch(tmp_path / "run")
    assert found["sharded"] and found["cut"] and found["moved"]
    assert not set(found["moved"]) & set(found["cut"])


def main(folder):
    import accelerate
    import transformers

    args = transformers.TrainingArguments(
        str(folder),
        **{**TRAINER, "save_strategy": "steps", "save_steps": 8},
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
    chooses = (folder.parent / "cut").exists()
    model = tiny_llama(num_hidden_layers=4 if chooses else 2)
    if chooses:
        torch.nn.init.zeros_(model.lm_head.weight)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = transformers.Trainer(model=model, args=args, train_dataset=sentences())
    from grades_kernels.integrations.transformers import add_grades

    callback = add_grades(trainer, cut="auto" if chooses else None, **OPTIONS)
    resume = folder.parent / "resume"
    trainer.train(resume_from_checkpoint=resume.read_text() if resume.exists() else None)
    optimizer = unwrap_optimizer(trainer.optimizer)
    params = dict(trainer.model.named_parameters())
    found = {
        "sharded": all(hasattr(p, "placements") for p in params.values()),
        "released": not all(p.requires_grad for p in params.values()),
        "events": [list(event) for event in optimizer.freeze_events],
        "losses": [x["loss"] for x in trainer.state.log_history if "loss" in x],
        "cut": callback.cut and callback.cut.frozen,
        "moved": [n for n, p in params.items() if not torch.equal(p.full_tensor(), start[n])],
    }
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
