// Whole tensors of 16 bits to float32 and back.
#include "convert.h"

namespace kan::cpu::KAN_ISA {

void widen_all(Storage type, const uint16_t* from, float* to, int64_t count) { widen(type, from, to, count); }
void narrow_all(Storage type, const float* from, uint16_t* to, int64_t count) { narrow_down(type, from, to, count); }

}  // namespace kan::cpu::KAN_ISA
