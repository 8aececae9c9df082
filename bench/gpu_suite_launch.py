"""One call of jsd_loss with its gradient on a CUDA device, for a profiler that starts where it is told to.

    ncu --profile-from-start off ... python bench/gpu_suite_launch.py 512 100000 40 [highest|high]

n, m and l; and torch's precision of float32 products.
"""

import sys

import torch

import kdejsd


def main(n: str, m: str, dim: str, precision: str = "highest") -> None:
    torch.set_float32_matmul_precision(precision)
    codes = torch.randn(int(n), int(dim), device="cuda", requires_grad=True)
    lagged = torch.randn(int(m), int(dim), device="cuda")
    bandwidth = int(m) ** (-1 / (int(dim) + 4))  # Scott's rule, as in the benchmarks
    kdejsd.jsd_loss(codes, lagged, bandwidth).backward()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    kdejsd.jsd_loss(codes, lagged, bandwidth).backward()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
