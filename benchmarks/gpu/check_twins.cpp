// The twins against plain matrix products; needs neither a GPU nor the CUDA toolkit. Ends with 1 if any differs.
#include <cstdio>

#include "twins.h"

int main() {
  const struct {
    const char* name;
    twin::Form form;
  } cases[] = {
      {"m16n8k8 tf32", {twin::Type::tf32, 8, false}},       {"m16n8k16 bf16", {twin::Type::bf16, 16, false}},
      {"m16n8k16 fp16", {twin::Type::fp16, 16, false}},     {"sparse m16n8k32 bf16", {twin::Type::bf16, 32, true}},
      {"sparse m16n8k32 fp16", {twin::Type::fp16, 32, true}}, {"sparse m16n8k16 tf32", {twin::Type::tf32, 16, true}},
  };
  twin::Random random{1};
  int wrong = 0;
  for (const auto& one : cases) {
    int differing = 0;
    for (int repeat = 0; repeat < 50; ++repeat) {
      twin::Sample sample = twin::sample(one.form, random);
      twin::multiply(sample.warp, one.form);
      for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
          float sum = sample.c[row * 8 + column];
          for (int k = 0; k < one.form.k; ++k) sum += sample.a[row * one.form.k + k] * sample.b[k * 8 + column];
          const twin::Place d = twin::place_d(row, column);
          differing += sample.warp.c[d.lane][d.index] != sum;
        }
    }
    std::printf("twin %-22s %s\n", one.name, differing ? "DIFFERS from the matrix product" : "ok");
    wrong += differing != 0;
  }
  return wrong != 0;
}
