// What every launcher and CPU kernel returns: 0 for success, a Status below zero, or a cudaError_t above zero.
#pragma once

namespace pyinf {

enum Status : int {
  kOk = 0,
  kInvalidArgument = -1,   // a size, stride or pointer that cannot be right
  kUnsupportedDtype = -2,  // no instance of the kernel for this dtype
  kUnsupportedShape = -3,  // the kernel does not serve these sizes, strides or this alignment
  kUnsupportedIsa = -4,    // the processor lacks the instructions
};

inline const char* status_name(int code) {
  switch (code) {
    case kOk:
      return "ok";
    case kInvalidArgument:
      return "invalid argument";
    case kUnsupportedDtype:
      return "unsupported dtype";
    case kUnsupportedShape:
      return "unsupported shape, stride or alignment";
    case kUnsupportedIsa:
      return "unsupported instruction set";
    default:
      return nullptr;
  }
}

}  // namespace pyinf
