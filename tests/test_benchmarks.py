"""The benchmarks besides measuring: where rows go, and that a command ends in time."""

import csv

from harness import run_python

from benchmarks import gpu


def test_the_environment_names_folder_and_commit_of_results(tmp_path):
    folder = tmp_path / "new" / "folder"
    code = """
import torch
from benchmarks import harness
harness.append_rows("rows", [{"case": "a"}, {"case": "b"}], torch.device("cpu"))
"""
    done = run_python("-c", code, GRADES_RESULTS=str(folder), GRADES_COMMIT="abc1234")
    assert done.returncode == 0, done.stderr
    with open(folder / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["commit"]) for row in rows] == [("a", "abc1234"), ("b", "abc1234")]


def test_a_command_for_the_gpu_ends_in_time(monkeypatch):
    monkeypatch.setattr(gpu, "SECONDS_TO_END", 0.5)
    assert gpu.run(("timeit", "-n1", "-r1", "pass"), 60)
    assert not gpu.run(("no_such_module",), 60)
    assert not gpu.run(("timeit", "-n1", "-r1", "import time; time.sleep(60)"), 0.5)


def test_every_file_with_a_gpu_test_is_run():
    assert "tests/test_triton_gpu.py" in gpu.test_files()
    assert "tests/test_docs.py" not in gpu.test_files()
