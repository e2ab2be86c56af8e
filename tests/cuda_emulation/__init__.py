"""The CUDA kernels of csrc/cuda on the CPU: compiled unchanged as ordinary C++, one fiber for each thread of a block.

    emulation.h    stands in for csrc/cuda/instructions.cuh: CUDA's keywords, and every instruction spelled out for a warp
    warpgroup.h    the same for csrc/cuda/warpgroup.cuh, and cluster.h for cluster.cuh
    runtime.cpp    blocks and clusters, barriers, warp-wide instructions; on the stacks of fibers.cpp
    warpgroup.cpp  products under way
    cluster.cpp    signals, and what the copy engine has under way
    library.cpp    the launch functions, for ctypes
    build.py       compiles and links, as they are or with a planted bug, with or without a sanitizer
    backend.py     the four contractions as a backend has them, on CPU tensors

It cannot see a wrong spelling of an instruction: that is what tests/ptx is for, which launches what nvcc made of the kernels by
the host code that is built here. It needs g++ on x86-64.
"""
