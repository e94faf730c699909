import sys, json, torch, time
sys.path.insert(0,"benchmarks/kernels")
import shared_prompt as S
from trainkit.kernels.paged import _tree
from trainkit.kernels import tree_attention
for c in (0,2):
    prompt,samples,length,Hq,Hkv=S.CASES[c]
    T=prompt+samples*length
    parents=torch.tensor([-1]+[0]*samples,dtype=torch.int32); indptr=torch.tensor([0,*(prompt+i*length for i in range(samples+1))],dtype=torch.int32)
    x=[S.make(1,T,h,128) for h in (Hq,Hkv,Hkv)]
    f=lambda q,k,v: tree_attention(q,k,v,parents,indptr)
    for pairs in (1<<30,0):
        _tree.MASKED_PAIRS=pairs; _tree._PLANS.clear()
        print(c,pairs,S.timed(f,x,0.1),flush=True)
    g=torch.randn_like(x[0]); o=f(*x)
    t=time.perf_counter(); [f(*x) for _ in range(20)]; print("host fwd us",(time.perf_counter()-t)*5e4); torch.cuda.synchronize()
    outs=[f(*x) for _ in range(10)]; torch.cuda.synchronize(); t=time.perf_counter(); [torch.autograd.grad(o,x,g) for o in outs]; print("host bwd us",(time.perf_counter()-t)*1e5); torch.cuda.synchronize()
    del outs
    from torch.profiler import profile, ProfilerActivity
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        torch.autograd.grad(f(*x),x,g); torch.cuda.synchronize()
    print(prof.key_averages().table(sort_by="cuda_time_total",row_limit=14,max_name_column_width=50)[:6000],flush=True)
