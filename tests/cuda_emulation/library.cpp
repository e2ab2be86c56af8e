// The launch functions for Python: 0, or 1 with kan_error() saying why.
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "emulation.h"

using namespace kan::cuda;

namespace {

std::string error;

// The scratch memory of the launch under way.
struct Scratch {
  char* memory;
  size_t bytes;
} scratch;

template <class P, class Workspace, class Launch>
int run(const P& p, const Device& device, Workspace workspace, Launch launch) {
  try {
    // What is not written holds NaN. Rows of 256 bytes, so that the alignment is the allocator's of a GPU.
    const size_t bytes = workspace(p, device);
    char* memory = static_cast<char*>(std::aligned_alloc(256, (bytes + 511) / 256 * 256));
    std::memset(memory, 0xff, bytes);
    scratch = {memory, bytes};
    const int code = launch(p, device, memory, nullptr);
    std::free(memory);
    if (code == 0) return 0;
    error = "error code " + std::to_string(code);
  } catch (const std::exception& problem) {
    error = problem.what();
  }
  return 1;
}

}  // namespace

extern "C" {
const char* kan_error() { return error.c_str(); }
const void* kan_scratch() { return &scratch; }
void kan_observe(kan::emulation::Observer observer) { kan::emulation::observer = observer; }
int kan_contract_output(const Problem* p, const Device* d) { return run(*p, *d, workspace_of_output, launch_contract_output); }
int kan_contract_input(const Problem* p, const Device* d) { return run(*p, *d, workspace_of_input, launch_contract_input); }
int kan_contract_weight(const Problem* p, const Device* d) { return run(*p, *d, workspace_of_weight, launch_contract_weight); }
void kan_cut_of_weight(const Problem* p, const Device* d, TileCut* cut) { *cut = cut_of_weight(*p, *d); }
const char* kan_why_not_network(const Network* n, const Device* d) { return why_not_network(*n, *d); }
int kan_network_output(const Network* n, const Device* d) { return run(*n, *d, workspace_of_network_output, launch_network_output); }
int kan_network_backward(const Network* n, const Device* d) {
  return run(*n, *d, workspace_of_network_backward, launch_network_backward);
}
}
