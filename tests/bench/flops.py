"""What a GPU does in bf16 when it does nothing but multiply matrices: `python -m bench.flops`."""

import time

import torch


def matmul_flops(side: int = 8192, times: int = 50) -> float:
    """FLOP/s of products of two (side, side) matrices of random numbers on the current GPU."""
    a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):  # the first time to warm up
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            a @ a
        torch.cuda.synchronize()
    return 2 * side**3 * times / (time.perf_counter() - began)


if __name__ == "__main__":
    print(matmul_flops())
