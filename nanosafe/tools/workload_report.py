"""What both sides of nanosafe.bench share: the command line of a workload, its clock, its report.

This file imports nothing of nanosafe: the peer's peak of memory is measured, too."""

import json
import sys
import time

import torch


class Workload:
    """A workload as it stands on the command line, and the report that it fills.

    NAME FOLDER OUT [key=value ...]

    NAME       of the workload
    FOLDER     with the models and tokens that nanosafe.bench has prepared
    OUT        a JSON file for the report: "seconds" and "work", a number per step or repetition
               without the first, which is warm-up, and what shows that both sides compute the same
    key=value  options, as JSON"""

    def __init__(self, usage):
        if len(sys.argv) < 4:
            print(usage)
            sys.exit()
        self.name, self.folder, self.out, *words = sys.argv[1:]
        self.options = {}
        for word in words:
            key, _, value = word.partition("=")
            self.options[key] = json.loads(value)
        self.device = self.options.pop("device", "cpu")
        dtype = self.options.pop("dtype", "float32")
        self.dtype = getattr(torch, dtype)  # computed in; trained weights are always float32
        self.report = {"seconds": [], "work": []}

    def read_tokens(self, name):
        with open(f"{self.folder}/{name}.json") as f:
            return json.load(f)

    def now(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def repeat(self, work, repetitions):
        """Call work(), which returns how much it did, and report all calls but the first."""
        for i in range(repetitions):
            began = self.now()
            amount = work()
            if i > 0:
                self.report["seconds"].append(self.now() - began)
                self.report["work"].append(amount)

    def write_report(self):
        """Write the report, with the peak of this process's memory in bytes."""
        if self.device == "cuda":
            self.report["peak"] = torch.cuda.max_memory_allocated()
        else:
            self.report["peak"] = read_peak_memory()
        with open(self.out, "w") as f:
            json.dump(self.report, f, allow_nan=False)  # nan would agree with everything


def read_peak_memory():
    """VmHWM, since the peak of getrusage() includes that of the process that started this one."""
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
