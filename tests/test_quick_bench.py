"""nanosafe.bench --quick: every part runs on a CPU, and none takes the others with it."""

import inspect
import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import run

from nanosafe.lora import MatrixAdapter
from nanosafe.parallel import World
from nanosafe.tools import devices, quick_bench, quick_checks, quick_workloads
from nanosafe.tools.quick_bench import Part, QuickBench

MACHINE = devices.Device(141, 700, 4000, 1, 1)._asdict()  # about an H200
CPU = World(rank=0, size=1, device=torch.device("cpu"), main=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_parts_run_on_a_cpu_and_leave_out_what_only_a_gpu_has(dtype, tmp_path):
    flags = ["--quick", f"--dtype={dtype}", f"--folder={tmp_path}"]
    printed = run("-m", "nanosafe.bench", *flags).stdout
    with open(tmp_path / "quick.json") as f:
        report = json.load(f)
    assert report["seconds"] < 290  # no part was left out
    assert len(report["checks"]) == 4
    assert all(check["passed"] for check in report["checks"])
    names = [row["name"] for row in report["rows"]]
    assert names == [
        "decode, tiny, 1 rows",
        "decode, tiny, 4 rows",
        "train, tiny, 256 tokens",
        "PPO-Lag, tiny, six models",
        "PPO-Lag, tiny, adapters on one base",
    ]
    for row in report["rows"]:
        assert row["amount"] > 0
        assert row["peak"] > 10**7
        assert not {"failed", "compiled", "waits", "reserved"} & row.keys()
    for row in report["rows"][3:]:
        assert row["metrics"]["ratio"] == 1
        assert row["metrics"]["sampler_gap"] < 1e-5
        assert row["phases"].keys() >= {"rollout", "actor: updates", "cost critic: updates"}
        assert row["roofline"].keys() >= {"responses", "actor", "cost critic"}
        assert abs(row["plan"] - row["peak"]) < 0.4 * row["peak"]
    assert printed.splitlines()[-1] == report["line"]
    assert not os.path.exists(tmp_path / quick_bench.MODELS)


# ---- a part that fails ----


@pytest.fixture
def bench(tmp_path):
    return QuickBench("cpu", "float32", str(tmp_path), seconds=300)


def run_with(monkeypatch, bench, end_process):
    """Run a part whose process ends as end_process(log) says; returns the reason that is given."""

    def run_process(command, stdout, timeout, **options):
        stdout.write("some words\n")
        with open(command[5], "w") as f:
            json.dump({"rows": [{"name": "first", "amount": 1.0, "unit": "s"}]}, f)
        return SimpleNamespace(returncode=end_process(stdout))

    monkeypatch.setattr(subprocess, "run", run_process)
    report = bench.run_part(Part("decode", "decode", {}))
    first, last = report["rows"]
    assert first["amount"] == 1.0  # what was measured before
    assert "no number" in quick_bench.describe_row(last)
    return last["failed"]


def end_by_an_error(log):
    log.write("torch.AcceleratorError: CUDA error: an illegal memory access\n  0%|  | 0/2\n")
    log.flush()
    return 1


def end_by_the_kernel(log):
    return -9


def end_too_late(log):
    raise subprocess.TimeoutExpired("python", 290)


@pytest.mark.parametrize(
    "end_process, reason",
    [
        (end_by_an_error, "CUDA error: an illegal memory access"),
        (end_by_the_kernel, "the host's memory was full"),
        (end_too_late, "ended after"),
    ],
)
def test_a_part_that_ends_badly_gives_one_line(end_process, reason, bench, monkeypatch, capsys):
    assert reason in run_with(monkeypatch, bench, end_process)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3  # which part began, what it measured, and how it ended


def test_a_report_that_was_cut_short_counts_as_none(tmp_path):
    path = tmp_path / "report.json"
    path.write_text('{"rows": [{"name"')
    assert quick_bench.take_report(path) == {"rows": []}
    assert quick_bench.take_report(path) == {"rows": []}  # it is removed


def test_a_row_that_was_begun_counts_as_none(tmp_path):
    path = tmp_path / "report.json"
    path.write_text('{"rows": [{"name": "first", "amount": 1.0}, {"name": "second", "peak": 9}]}')
    assert quick_bench.take_report(path)["rows"] == [{"name": "first", "amount": 1.0}]


def break_kernel(world):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def test_a_check_that_fails_or_is_not_finite_is_wrong_and_the_others_go_on(monkeypatch):
    checks = {
        "broken": (break_kernel, 1.0),
        "not finite": (lambda world: float("nan"), 1.0),
        "too far": (lambda world: 2.0, 1.0),
        "right": (lambda world: 0.5, 1.0),
    }
    monkeypatch.setattr(quick_checks, "choose", lambda device: checks)
    workload = SimpleNamespace(device="cpu", report={})
    quick_workloads.check(workload, None)
    found = workload.report["checks"]
    assert [check["passed"] for check in found] == [False, False, False, True]
    json.dumps(found, allow_nan=False)
    lines = [quick_bench.describe_check(check) for check in found]
    assert lines[0] == (
        "WRONG: broken (RuntimeError: no kernel image is available for execution on the device)"
    )
    assert lines[1] == "WRONG: not finite (error nan)"
    assert lines[3] == "right: right (error 0.5, at most 1)"


def test_a_part_that_has_no_time_left_is_left_out(bench):
    bench.seconds = 5
    report = bench.run_part(Part("decode", "decode", {}))
    assert report["rows"][0]["failed"] == "left out: 5 s are over"


def test_a_size_that_does_not_fit_into_memory_gives_one_line_and_the_next_one_runs():
    workload = SimpleNamespace(device="cpu", report={"rows": []}, write_report=lambda: None)
    with quick_workloads.new_row(workload, "large"):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB.")
    with quick_workloads.new_row(workload, "small") as row:
        row["amount"] = 3.0
    large, small = workload.report["rows"]
    assert large["failed"].startswith("out of memory") and "\n" not in large["failed"]
    assert small["amount"] == 3.0 and "failed" not in small


def test_a_defect_is_not_taken_for_a_lack_of_memory():
    workload = SimpleNamespace(device="cpu", report={"rows": []})
    with pytest.raises(KeyError), quick_workloads.new_row(workload, "wrong"):
        raise KeyError("a name")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--long"], "too large for a CPU"),
        (["--quick", "--device=tpu"], "device='tpu': choose one of cpu, cuda"),
        (["--quick=maybe"], "quick takes true, false, 1 or 0"),
    ],
)
def test_a_mistake_stops_with_one_line(flags, words, tmp_path):
    done = run("-m", "nanosafe.bench", *flags, f"--folder={tmp_path}", check=False)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ---- what a GPU would run ----


def test_the_parts_for_a_gpu_have_the_options_that_they_take():
    parts = quick_bench.list_parts(quick_bench.GPU_SIZES, MACHINE)
    parts += quick_bench.list_long_parts(MACHINE)
    functions = {"loss": quick_workloads.measure_loss, "models": quick_workloads.write_models}
    for part in parts:
        function = functions.get(part.work) or getattr(quick_workloads, part.work)
        inspect.signature(function).bind("workload", "counts", **part.options)
        assert part.options.get("shape", "7b") in quick_workloads.SHAPES
        json.dumps(part.options)


@pytest.mark.parametrize(
    "shape, tokens, gigabytes", [("1.1b", 8192, 50), ("7b-8-layers", 8192, 70), ("3b", 4096, 78)]
)
def test_what_is_trained_fits_on_one_gpu_by_the_plan(shape, tokens, gigabytes, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench"])  # which the planner's knobs are read from
    workload = SimpleNamespace(dtype=torch.bfloat16, device="cuda")
    flags = {"batch_size": tokens // 2048, "max_len": 2048, "max_tokens": tokens}
    flags["dtype"] = "bfloat16"
    planned = quick_workloads.plan_run(workload, "train_sft.py", flags, shape, MACHINE, 2048)
    assert 10 < planned.training_peak() / 1e9 < gigabytes
    assert planned.phases()[0].flops > 6 * tokens * 1e9


def test_waits_of_the_host_and_compiled_versions_are_counted_on_a_gpu(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    row = {}
    with warnings.catch_warnings():
        counts = quick_workloads.Counts("cuda")
        with counts.added_to(row):
            for _ in range(3):  # from one and the same line
                warnings.warn(f"{quick_workloads.SYNC_WARNING} (Triggered internally)")
            warnings.warn("something else")
    assert row == {"compiled": 0, "waits": 3}
    assert modes == ["warn", "default"]


# ---- the checks see what is wrong ----


def test_the_check_of_the_sampler_sees_other_probabilities(monkeypatch):
    generate = quick_checks.rollout.generate

    def generate_wrong(*arguments, **options):
        sampled = generate(*arguments, **options)
        wrong = [[logp - 0.1 for logp in row] for row in sampled.logps]
        return sampled._replace(logps=wrong)

    assert quick_checks.compare_sampler(CPU) < 0.001
    monkeypatch.setattr(quick_checks.rollout, "generate", generate_wrong)
    assert quick_checks.compare_sampler(CPU) > 0.05


def test_the_check_of_adapters_sees_one_that_changes_nothing(monkeypatch):
    pair = MatrixAdapter.pair

    def pair_of_zeros(self, dtype):
        found = pair(self, dtype)
        return found._replace(B=0 * found.B)

    assert quick_checks.compare_adapter(CPU) < 0.06
    monkeypatch.setattr(MatrixAdapter, "pair", pair_of_zeros)
    assert not quick_checks.compare_adapter(CPU) <= 0.06


def test_every_check_is_chosen_on_a_gpu_and_those_of_graphs_only_there():
    on_gpu, on_cpu = quick_checks.choose("cuda"), quick_checks.choose("cpu")
    assert len(on_gpu) == 6
    assert on_cpu.items() <= on_gpu.items()
