// Filled in by setup.py, which writes build_info.cpp into the build directory.
#pragma once

namespace pyinf {
// A JSON object: compiler, nvcc, architectures, flags, git hash, instruction-set levels.
const char* build_info_json();
}  // namespace pyinf
