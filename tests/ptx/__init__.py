"""An interpreter of PTX in NumPy: runs what a compiler made for sm_80 and sm_90, a block at a time, without a GPU.

    program.py       text of a kernel -> instructions
    memory.py        global and shared memory, with checks
    block.py         control flow, registers and ordinary instructions of one block
    tensor_cores.py  mma, wgmma, ldmatrix, stmatrix by their fragment layouts

It stops at what hardware lets pass in silence: accesses out of bounds, misaligned or to shared memory that nobody wrote,
races between warps, registers read before they are written, warp-wide instructions that part of a warp reaches, asynchronous
copies still under way at the end, and wgmma operands written without a fence. Not known: atomics, mbarrier, TMA, tcgen05,
float16. Rates, and rounding of approximate instructions, are not modelled.
"""
