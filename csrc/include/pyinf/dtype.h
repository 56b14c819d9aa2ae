// Element types as they cross the binding. The numbers are part of the interface between Python and C++.
#pragma once

namespace pyinf {

enum Dtype : int {
  kFloat32 = 0,
  kFloat64 = 1,
  kFloat16 = 2,
  kBFloat16 = 3,
};

}  // namespace pyinf
