"""What GPUs, and this machine, can hold and compute: data sheets and measured rates."""

import os
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer


class Device(NamedTuple):
    """A GPU, or the CPU of this machine, by its data sheet."""

    memory: float  # GB
    matrix: float  # TFLOP/s of matrix products, in bfloat16 without sparsity
    bandwidth: float  # GB/s of its memory
    link: float  # GB/s to another GPU of the node, one way
    network: float  # GB/s of a node
    is_cpu: bool = False


GPUS = {
    "a800-80gb": Device(memory=80, matrix=312, bandwidth=2039, link=200, network=100),
    "a100-80gb": Device(memory=80, matrix=312, bandwidth=2039, link=300, network=100),
    "a100-40gb": Device(memory=40, matrix=312, bandwidth=1555, link=300, network=100),
    "h100": Device(memory=80, matrix=989, bandwidth=3350, link=450, network=400),
    "h200": Device(memory=141, matrix=989, bandwidth=4800, link=450, network=400),
    "rtx-4090": Device(memory=24, matrix=165, bandwidth=1008, link=25, network=25),
}
SHARES = {"matrix": 0.57, "bandwidth": 0.68, "link": 0.7}  # of each rate, as others reached it
HOST_LINK = 25  # GB/s of PCIe 4 between a GPU and its host; a GPU's share of the host's memory, too
GPUS_PER_NODE = 8
RESERVED = 2.5  # GB for CUDA, NCCL's buffers and fragmentation; on a CPU for other processes


def measure_this_machine(device="cpu", dtype="float32"):
    """The Device that this machine has: the rates of a large matrix product and of a large copy."""
    size = 1024 if device == "cpu" else 8192
    matrix = torch.randn(size, size, device=device)
    if dtype == "bfloat16":
        matrix = matrix.bfloat16()
    source = torch.randn(2**25, device=device)
    target = torch.empty_like(source)
    product_seconds = measure_seconds("matrix @ matrix", matrix=matrix)
    copy_seconds = measure_seconds("target.copy_(source)", target=target, source=source)
    if device == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        link = 0
    else:
        memory = torch.cuda.mem_get_info()[1]
        link = 1
    matrix_rate = 2 * size**3 / product_seconds / 1e12
    bandwidth = 2 * source.nbytes / copy_seconds / 1e9
    return Device(memory / 1e9, matrix_rate, bandwidth, link, network=1, is_cpu=device == "cpu")


def measure_seconds(statement, **names):
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median
