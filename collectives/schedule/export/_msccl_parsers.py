"""The three runtimes that read MSCCL's XML, and what each of them takes."""

from dataclasses import dataclass

# MSCCL keeps a name in 64 bytes (MSCCL_MAX_ALGO_NAME, src/include/msccl.h line 94), the parsers a value in 256.
MOST_NAME = 63


@dataclass(frozen=True)
class Parser:
    """What a runtime's parser and kernel take; no more of each."""

    name: str
    """As people call it."""
    reduce_scatter: str
    """What it calls that collective."""
    steps: int
    """Steps of a thread block (MSCCL_MAX_NUM_STEPS)."""
    blocks: int
    """Thread blocks of a rank: they wait for each other, so they run together, one a multiprocessor."""
    channels: int = 32
    """MAXCHANNELS of NCCL 2.8 and 2.19."""
    blocks_per_channel: int = 32
    """MSCCL_MAX_NUM_THREAD_BLOCKS_PER_CHANNEL."""
    most_chunks: int = 71
    """Chunks of a step: fewer than MSCCL_MAX_COUNT, 72."""
    nodes: int = 4095
    """XML elements that it keeps of a file: fewer than MAX_NODES, 4096, as it needs one to see the end."""

    def collective(self, name: str) -> str:
        """The runtime's word for a collective."""
        return self.reduce_scatter if name == "reduce_scatter" else name


# Read in microsoft/msccl at b23e9cd (src/include/msccl.h, src/graph/topo.cc, src/graph/xml.h), Azure/msccl-executor-nccl
# at c6f6b36 and ROCm/rccl at 0cbce2a (src/include/msccl/msccl_struct.h, msccl_parser.h, src/misc/msccl/msccl_parser.cc).
# 108: an A100's multiprocessors, fewer than the parsers' 216 and 1024. RCCL's parser itself takes 64 blocks of 64 steps;
# the executor's steps are 64 unless it is built with more (makefiles/common.mk line 19).
PARSERS = {
    "msccl": Parser("MSCCL", "reduce_scatter", steps=256, blocks=108),
    "azure": Parser("MSCCL's executor for NCCL", "reducescatter", steps=64, blocks=108),
    "rccl": Parser("RCCL", "reducescatter", steps=64, blocks=64),
}
