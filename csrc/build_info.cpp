// kan_fast._build_info: how the native code was built and what it will run. Needs no torch, so it can be asked even where
// the operator library fails to load. The KAN_* macros come from setup.py.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "isa.h"

namespace py = pybind11;

namespace {

std::string compiler() {
    std::ostringstream text;
#if defined(__clang__)
    text << "clang " << __clang_version__;
#elif defined(__GNUC__)
    text << "gcc " << __VERSION__;
#else
    text << "unknown";
#endif
    text << ", C++ " << __cplusplus;
    return text.str();
}

py::list split(const std::string& words) {
    py::list out;
    std::istringstream stream(words);
    for (std::string word; stream >> word;) out.append(word);
    return out;
}

py::dict info() {
    const std::string cuda_archs = KAN_CUDA_ARCHS;
    py::dict out;
    out["version"] = KAN_FAST_VERSION;
    out["compiler"] = compiler();
    out["target"] = KAN_TARGET;
    out["torch"] = KAN_TORCH_VERSION;
    out["isa_built"] = split(KAN_ISAS);
    out["isa_chosen"] = kan::isa_name(kan::chosen_isa());
    out["cuda_archs"] = cuda_archs.empty() ? py::object(py::none()) : py::object(split(cuda_archs));
    return out;
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
    m.def("info", &info,
          "How the native code was built: version, compiler, target machine, torch headers, instruction sets built, the one "
          "chosen on this machine, CUDA architectures or None.");
}
