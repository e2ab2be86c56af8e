// The instructions of a warpgroup: four warps multiply 64 rows at once, and go on while the tensor cores work (sm_90a only).
// As with instructions.cuh, the emulation in tests/ has a twin of this file with the same guard.
//
// Written by the PTX ISA, section 9.7.15 "Asynchronous Warpgroup Level Matrix Instructions".
#ifndef KAN_CUDA_WARPGROUP
#define KAN_CUDA_WARPGROUP

#include "instructions.cuh"

// Feature-specific code: a build for plain sm_90, or for a newer GPU, has none of it.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define KAN_WARPGROUPS 1
#define KAN_ASM(...) asm volatile(__VA_ARGS__)
#else
#define KAN_WARPGROUPS 0
#define KAN_ASM(...)
#endif

namespace kan::cuda {

// Of a pointer to shared memory: the address that descriptors have.
KAN_DEVICE uint32_t shared_address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

// 9.7.15.4 "Async Proxy": tensor cores read shared memory by another path than threads write it by; this orders the two. After
// it a barrier, then the product. What a finished product has read needs no fence before it is written again.
KAN_DEVICE void show_to_tensor_cores() { KAN_ASM("fence.proxy.async.shared::cta;" ::: "memory"); }

// 9.7.13.1, barrier: one of 15 numbered ones, at which as many threads are counted, from wherever they stand. Who arrives goes on;
// what it wrote before is seen by those who meet.
KAN_DEVICE void meet(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
KAN_DEVICE void arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// 9.7.19.5, setmaxnreg: a warpgroup's registers from here on, a multiple of 8, in place of the 128 that a thread of 512 has. What
// some take others must give.
template <int kRegisters> KAN_DEVICE void set_registers() {
  if constexpr (kRegisters > 128) KAN_ASM("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  if constexpr (kRegisters < 128) KAN_ASM("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

KAN_DEVICE void load_16_bytes(uint32_t (&words)[4], const void* shared) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(shared))
               : "memory");
}
// To shared memory, from where tensor cores will read it: to the address with the bits `turned` inverted.
KAN_DEVICE void store_16_bytes(void* shared, const uint32_t (&words)[4], uint32_t turned = 0) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared) ^ turned), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}
KAN_DEVICE void store_8_bytes(void* shared, const uint32_t (&words)[2]) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared_address(shared)), "r"(words[0]), "r"(words[1]) : "memory");
}

// 9.7.15.7: before a product, once its registers (sums and left operand) are written; not between products of one shape that
// only share sums.
KAN_DEVICE void order_registers() { KAN_ASM("wgmma.fence.sync.aligned;" ::: "memory"); }
KAN_DEVICE void commit_products() { KAN_ASM("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until then nobody may touch the registers of the products, nor write what they read of shared memory.
template <int kGroupsLeft> KAN_DEVICE void wait_for_products() { KAN_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory"); }

#define KAN_SUMS_64 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define KAN_SUMS_128 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, " \
  "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, " \
  "%106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127}"
#define KAN_FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define KAN_SIXTEEN(i) KAN_FOUR(i), KAN_FOUR(i + 4), KAN_FOUR(i + 8), KAN_FOUR(i + 12)
#define KAN_OPERANDS_64 KAN_SIXTEEN(0), KAN_SIXTEEN(16), KAN_SIXTEEN(32), KAN_SIXTEEN(48)
#define KAN_OPERANDS_128 KAN_OPERANDS_64, KAN_SIXTEEN(64), KAN_SIXTEEN(80), KAN_SIXTEEN(96), KAN_SIXTEEN(112)

// c (64 x columns) += a b, float32 sums, a and b in shared memory by matrix descriptors: with the depth contiguous ("K-major"), or
// by lines of rows or columns at one depth ("MN-major", imm-trans = 1). Warp w of the group has rows 16 w .. 16 w + 15 of c.
// 9.7.15.5.1.1, "Register Fragments", with g = lane / 4, q = lane % 4: c[4 j + r] lies in row g + 8 (r / 2), column
// 8 j + 2 q + r % 2. The numbers behind the descriptors: scale-d (whether what the sums were counts), signs of a and b,
// imm-trans-a, imm-trans-b.
//
// Or a in registers, a warp's 16 rows laid out as that of mma_bfloat16 (instructions.cuh). Until the product has been waited for
// they are in use as the sums are.
//
// Sparse (9.7.15.6): such an a, stored with half its columns, two of every four; e has the metadata as mma_sparse_bfloat16 takes
// it, sparsity selector 0: lanes 0 and 1 of each quad supply it.
#define KAN_WGMMA(name, type, columns, sums, a0, a1, a2, a3, b, e, f)                                                   \
  template <bool kLeftByLines, bool kRightByLines>                                                                      \
  KAN_DEVICE void wgmma_##name(float (&c)[sums], uint64_t left, uint64_t right, bool kept = true) {                     \
    KAN_ASM("{ .reg .pred kept; setp.ne.b32 kept, " b ", 0; wgmma.mma_async.sync.aligned.m64n" columns                  \
            "k16.f32." type "." type " " KAN_SUMS_##sums ", " a0 ", " a1 ", kept, 1, 1, " a2 ", " a3 "; }"              \
            : KAN_OPERANDS_##sums                                                                                       \
            : "l"(left), "l"(right), "n"(int(kLeftByLines)), "n"(int(kRightByLines)), "r"(int(kept)));                  \
  }                                                                                                                     \
  template <bool kRightByLines>                                                                                         \
  KAN_DEVICE void wgmma_##name(float (&c)[sums], const uint32_t (&a)[4], uint64_t right, bool kept = true) {            \
    KAN_ASM("{ .reg .pred kept; setp.ne.b32 kept, " f ", 0; wgmma.mma_async.sync.aligned.m64n" columns                  \
            "k16.f32." type "." type " " KAN_SUMS_##sums ", {" a0 ", " a1 ", " a2 ", " a3 "}, " b ", kept, 1, 1, " e "; }" \
            : KAN_OPERANDS_##sums                                                                                       \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right), "n"(int(kRightByLines)), "r"(int(kept)));         \
  }                                                                                                                     \
  KAN_DEVICE void wgmma_sparse_##name(float (&c)[sums], const uint32_t (&a)[4], uint64_t descriptor, const uint32_t& metadata) { \
    KAN_ASM("wgmma.mma_async.sp.sync.aligned.m64n" columns "k32.f32." type "." type " " KAN_SUMS_##sums                 \
            ", {" a0 ", " a1 ", " a2 ", " a3 "}, " b ", " e ", 0, 1, 1, 1, 1;"                                          \
            : KAN_OPERANDS_##sums                                                                                       \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(metadata));                              \
  }
#define KAN_WGMMA_SIZES(name, type)                                                            \
  KAN_WGMMA(name, type, "128", 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")                   \
  KAN_WGMMA(name, type, "256", 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
KAN_WGMMA_SIZES(bfloat16, "bf16")
KAN_WGMMA_SIZES(float16, "f16")

#undef KAN_WGMMA_SIZES
#undef KAN_WGMMA
#undef KAN_OPERANDS_128
#undef KAN_OPERANDS_64
#undef KAN_SIXTEEN
#undef KAN_FOUR
#undef KAN_SUMS_128
#undef KAN_SUMS_64
#undef KAN_ASM

}  // namespace kan::cuda

#endif
