"""One forward and backward pass each of softpick and of cuDNN's softmax at (4,4096,16,64) and (4,4096,16,128), for a profiler.

ncu --profile-from-start off --clock-control none --set full --csv --page raw python benchmarks/profile_gpu.py > profile.csv
"""

import torch
from attention_gpu import ours
from peers_gpu import PEERS

for d in (64, 128):
    q, k, v = (torch.randn(4, 16, 4096, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    grad = torch.randn_like(q)
    for attention in (ours(), PEERS["cudnn"]):
        attention(q, k, v).backward(grad)  # compiles
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        attention(q, k, v).backward(grad)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
