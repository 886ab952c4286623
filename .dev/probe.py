import sys, torch
sys.path.insert(0,"benchmarks")
from peers_gpu import SHAPES, PEERS, times
import softpick
from softpick.ops.triton import launch
own=launch._together
def ours(name="softpick"):
    return lambda q,k,v: softpick.scaled_dot_product_attention(q,k,v,is_causal=True,enable_gqa=q.shape[1]!=k.shape[1],normalizer=name,backend="triton")
for shape,(b,t,h,hkv,d) in SHAPES.items():
    q,grad=(torch.randn(b,h,t,d,device="cuda",dtype=torch.bfloat16) for _ in range(2))
    k,v=(torch.randn(b,hkv,t,d,device="cuda",dtype=torch.bfloat16) for _ in range(2))
    line=[]
    for tg in (1,4,8,16,32,10**6,None):
        launch._together = own if tg is None else (lambda pairs,*a,tg=tg: min(pairs,tg))
        f,bw=times(ours(),q,k,v,grad); line.append(f"{tg}: {f:.3f}/{bw:.3f}")
    f,bw=times(ours("softmax"),q,k,v,grad); line.append(f"softmax {f:.3f}/{bw:.3f}")
    for n in ("flex","cudnn"):
        f,bw=times(PEERS[n],q,k,v,grad); line.append(f"{n} {f:.3f}/{bw:.3f}")
    print(shape,"; ".join(line),flush=True)
