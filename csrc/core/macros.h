// Function attributes shared by the torch-free layers (functors and kernels).
#pragma once

// TX_HD marks arithmetic that is compiled by the host compiler and by nvcc from the same source. On the host it must be
// inlined into the multi-versioned loops below, so that it is compiled for their instruction set.
#if defined(__CUDACC__)
#define TX_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define TX_HD inline __attribute__((always_inline))
#else
#define TX_HD inline
#endif

// TX_CLONES compiles a hot loop for several instruction sets and picks one at load time. Contraction is off for all of
// them, so the bits do not depend on the choice. Sanitizers and debuggers cope with the resolver; musl and macOS do
// not.
#if !defined(__CUDACC__) && defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && \
    !defined(__clang__) && !defined(TORCH_EXT_NO_CLONES)
#define TX_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TX_CLONES
#endif
