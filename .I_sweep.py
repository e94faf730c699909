import sys, json, torch, traceback, time
sys.path.insert(0,"benchmarks/kernels")
import paged as P
from trainkit.kernels.paged import _launch
from trainkit.kernels._attention._call import Tiling
from trainkit.kernels import PagedAttention
lengths=[1,37,5000,0,16,4096,777]
index,total=P.tables(lengths); index[3][3]=0
q=torch.randn(7,32,128,device="cuda",dtype=torch.bfloat16); cache=torch.randn(total,2,16,8,128,device="cuda",dtype=torch.bfloat16)
a=P.ours(index,total,q,cache)()
r=PagedAttention(backend="reference"); r.plan(*index,num_qo_heads=32,num_kv_heads=8,head_dim=128,page_size=16,num_pages=total,dtype=q.dtype)
b=r.run(q,cache)
fin=b[1].isfinite()
print("err",(a[0].float()-b[0].float()).abs().max().item(),(a[1]-b[1])[fin].abs().max().item(), flush=True)
base=_launch.tiling
for bn,warps,stages,progs,merged in ((64,4,3,2,4096),(64,4,4,2,4096),(64,4,3,2,16384),(128,4,2,2,4096),(64,4,3,3,4096),(32,4,4,3,4096),(64,2,3,3,4096),(64,4,5,1,4096)):
    _launch.tiling=lambda rows,hd,dev: Tiling(16,bn,warps,stages) if rows<=16 else base(rows,hd,dev)
    _launch.PROGRAMS=progs; _launch.MERGED=merged
    try:
        t=time.time()
        out={n:P.row(n,torch.bfloat16,0.04,False)["ours"] for n in ("1x4096","1x65536","16x8192","64x4096","skewed")}
        print(bn,warps,stages,progs,merged,out,round(time.time()-t,1),flush=True)
    except Exception as e: print(bn,warps,stages,progs,repr(e)[:200],flush=True)
_launch.MERGED=4096
for bm,bn,warps,stages,progs in ((64,64,4,3,1),(64,64,4,3,2),(64,128,4,2,1),(128,64,8,3,1),(128,128,8,2,1)):
    _launch.tiling=lambda rows,hd,dev: Tiling(bm,bn,warps,stages)
    _launch.PROGRAMS=progs
    try: print(bm,bn,warps,stages,progs,P.shared(0.04),flush=True)
    except Exception as e: print(bm,bn,repr(e)[:200],flush=True)
