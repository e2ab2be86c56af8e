"""An interpreter of PTX in NumPy: runs what Triton and nvcc made for sm_80 and sm_90, a block or a cluster at a time,
without a GPU.

    program.py       text of a kernel -> instructions, calls inlined
    memory.py        global and shared memory, with checks
    block.py         control flow, barriers, registers and memory accesses of one block
    cluster.py       clusters of blocks: their barrier, signals (mbarrier), boxes that the copy engine brings (TMA, multicast)
    arithmetic.py    numbers, bits, comparisons, conversions
    tensor_cores.py  mma, wgmma, their sparse forms, ldmatrix, stmatrix, movmatrix by their fragment layouts
    cuda.py          the kernels of csrc/cuda, launched by their own host code, as a backend

It stops at what hardware lets pass in silence: accesses out of bounds, misaligned or to shared memory that nobody wrote,
races between warps, registers read before they are written, warp-wide instructions that part of a warp reaches, asynchronous
copies and products still under way at the end, barriers where not all come, wgmma operands written without a fence or while
they are read, signals that not all were shown, too many arrivals or bytes at one, boxes that come before there is room or that
nobody waits for, blocks that end before others are done with them. Boxes arrive as late as can be, in an order drawn by lot.
Sums of products under way are there at once: who reads them too early goes unseen. Not known: atomics, of mbarrier and TMA what
csrc/cuda/cluster.cuh does not spell, tcgen05, arithmetic in float16. Rates, and rounding of approximate instructions, are not
modelled.
"""
