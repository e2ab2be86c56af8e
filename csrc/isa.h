// Which instruction sets this build holds, and which one this machine runs: one function for the kernels' dispatch and for
// the build information, so that what is printed is what is used.
// The build defines KAN_BUILT_AVX2 and KAN_BUILT_AVX512 where those paths were compiled (x86-64); "baseline" always was.
#pragma once
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace kan {

enum class Isa { baseline, avx2, avx512 };

inline const char* isa_name(Isa isa) {
    return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

// The widest instruction set that was built and that CPU and operating system offer.
inline Isa widest_isa() {
#ifdef KAN_BUILT_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
        __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
        return Isa::avx512;
#endif
#ifdef KAN_BUILT_AVX2
    // f16c is not asked for: not every compiler knows the name here, and every CPU with AVX2 has it.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
        __builtin_cpu_supports("bmi2"))
        return Isa::avx2;
#endif
    return Isa::baseline;
}

// KAN_FAST_ISA (baseline | avx2 | avx512) lowers the choice, so that one machine can test every path; asking for more than
// there is, or for an unknown name, throws std::runtime_error.
inline Isa chosen_isa() {
    const Isa widest = widest_isa();
    const char* wanted = std::getenv("KAN_FAST_ISA");
    if (wanted == nullptr || *wanted == '\0') return widest;
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
        if (isa <= widest && std::string(wanted) == isa_name(isa)) return isa;
    throw std::runtime_error(std::string("KAN_FAST_ISA=") + wanted + ": expected baseline, avx2 or avx512, up to " +
                             isa_name(widest) + ", the widest that this build and this CPU share");
}

}  // namespace kan
