// The only file that knows pybind11. Pointers cross as integers (a tensor's data_ptr()), so nothing here needs torch.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "pyinf/build_info.h"
#include "pyinf/cpu/gradients.h"
#include "pyinf/cpu/isa.h"
#include "pyinf/cpu/projection.h"
#include "pyinf/cpu/scan.h"
#include "pyinf/dtype.h"
#include "pyinf/philox.h"
#include "pyinf/status.h"

#ifdef PYINF_WITH_CUDA
#include "pyinf/accumulate_squared_gradients.h"
#include "pyinf/cuda_info.h"
#include "pyinf/project_gradients.h"
#include "pyinf/random_projection.h"
#include "pyinf/scan_topk.h"
#include "pyinf/sparse_projection.h"
#endif

namespace py = pybind11;

namespace {

template <typename T>
using Raw = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <typename T>
T from_raw(Raw<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

// Binds a plain C++ function; every pointer argument is taken as an integer, and the interpreter lock is released.
template <auto Function>
struct Binder;

template <typename R, typename... Args, R (*Function)(Args...)>
struct Binder<Function> {
  static R call(Raw<Args>... args) { return Function(from_raw<Args>(args)...); }
};

template <auto Function, typename... Extra>
void def_raw(py::module_& m, const char* name, const Extra&... extra) {
  m.def(name, &Binder<Function>::call, py::call_guard<py::gil_scoped_release>(), extra...);
}

py::object build_config() {
  py::object config = py::module_::import("json").attr("loads")(pyinf::build_info_json());
#ifdef PYINF_WITH_CUDA
  config["cudart"] = pyinf::cuda_runtime_version();
#else
  config["cudart"] = py::none();
#endif
  config["cpu_isa_here"] = static_cast<int>(pyinf::cpu::detect_isa());
  return config;
}

py::object error_name(int code) {
  if (const char* name = pyinf::status_name(code)) return py::str(name);
#ifdef PYINF_WITH_CUDA
  if (code > 0) return py::str(pyinf::cuda_error_name(code));
#endif
  return py::str("unknown error " + std::to_string(code));
}

void bind_cpu(py::module_& m) {
  // Arguments are those of the headers in pyinf/cpu/, in their order.
  def_raw<&pyinf::cpu::accumulate_squared_gradients>(m, "cpu_accumulate_squared_gradients");
  def_raw<&pyinf::cpu::random_projection>(m, "cpu_random_projection");
  def_raw<&pyinf::cpu::sparse_projection>(m, "cpu_sparse_projection");
  def_raw<&pyinf::cpu::scan_bits>(m, "cpu_scan_bits");
  m.def(
      "philox4x32",
      [](std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uint32_t k0, std::uint32_t k1) {
        const pyinf::Philox4 out = pyinf::philox4x32(c0, c1, c2, c3, k0, k1);
        return py::make_tuple(out.w[0], out.w[1], out.w[2], out.w[3]);
      },
      "One Philox4x32-10 block: counter (4 words), key (2 words).");
}

#ifdef PYINF_WITH_CUDA
// Arguments are those of the headers in pyinf/, under their names there.
void bind_squared_gradients(py::module_& m) {
  def_raw<&pyinf::launch_accumulate_squared_gradients>(
      m, "cuda_accumulate_squared_gradients", py::arg("lam"), py::arg("ld_lam"), py::arg("g"), py::arg("ld_g"),
      py::arg("a"), py::arg("ld_a"), py::arg("offsets"), py::arg("sequences"), py::arg("d_out"), py::arg("d_in"),
      py::arg("dtype"), py::arg("device"), py::arg("stream"));
}

void bind_projections(py::module_& m) {
  def_raw<&pyinf::random_projection_workspace>(m, "cuda_random_projection_workspace", py::arg("batch"), py::arg("d"),
                                               py::arg("k"));
  def_raw<&pyinf::launch_random_projection>(
      m, "cuda_random_projection", py::arg("out"), py::arg("ld_out"), py::arg("x"), py::arg("ld_x"), py::arg("batch"),
      py::arg("d"), py::arg("k"), py::arg("seed"), py::arg("philox_stream"), py::arg("distribution"), py::arg("dtype"),
      py::arg("workspace"), py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"));
  def_raw<&pyinf::sparse_projection_workspace>(m, "cuda_sparse_projection_workspace", py::arg("batch"), py::arg("d"),
                                               py::arg("k"));
  def_raw<&pyinf::launch_sparse_projection>(
      m, "cuda_sparse_projection", py::arg("out"), py::arg("ld_out"), py::arg("x"), py::arg("ld_x"), py::arg("batch"),
      py::arg("d"), py::arg("k"), py::arg("nnz"), py::arg("seed"), py::arg("philox_stream"), py::arg("dtype"),
      py::arg("workspace"), py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"));
  def_raw<&pyinf::sparse_projection_factors_workspace>(m, "cuda_sparse_projection_factors_workspace",
                                                       py::arg("sequences"), py::arg("d_out"), py::arg("d_in"),
                                                       py::arg("k"));
  def_raw<&pyinf::launch_sparse_projection_factors>(
      m, "cuda_sparse_projection_factors", py::arg("out"), py::arg("ld_out"), py::arg("g"), py::arg("ld_g"),
      py::arg("a"), py::arg("ld_a"), py::arg("offsets"), py::arg("sequences"), py::arg("d_out"), py::arg("d_in"),
      py::arg("k"), py::arg("nnz"), py::arg("seed"), py::arg("philox_stream"), py::arg("dtype"), py::arg("workspace"),
      py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"));
}

void bind_project_gradients(py::module_& m) {
  def_raw<&pyinf::project_gradients_workspace>(m, "cuda_project_gradients_workspace", py::arg("rows"),
                                               py::arg("sequences"), py::arg("k_g"), py::arg("k_a"));
  def_raw<&pyinf::launch_project_gradients>(
      m, "cuda_project_gradients", py::arg("out"), py::arg("row_scale"), py::arg("g"), py::arg("ld_g"), py::arg("a"),
      py::arg("ld_a"), py::arg("offsets"), py::arg("rows"), py::arg("sequences"), py::arg("d_out"), py::arg("d_in"),
      py::arg("p_g"), py::arg("ld_p_g"), py::arg("p_a"), py::arg("ld_p_a"), py::arg("k_g"), py::arg("k_a"),
      py::arg("seed"), py::arg("stream_g"), py::arg("stream_a"), py::arg("distribution"), py::arg("epilogue"),
      py::arg("dtype"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"));
}

void bind_scan(py::module_& m) {
  def_raw<&pyinf::scan_topk_workspace>(m, "cuda_scan_topk_workspace", py::arg("count"), py::arg("n"), py::arg("d"),
                                       py::arg("k"), py::arg("format"), py::arg("parts"));
  def_raw<&pyinf::launch_scan_topk>(m, "cuda_scan_topk", py::arg("values"), py::arg("indices"), py::arg("queries"),
                                    py::arg("part_stride"), py::arg("ld_queries"), py::arg("rows"), py::arg("ld_rows"),
                                    py::arg("scale"), py::arg("count"), py::arg("n"), py::arg("d"), py::arg("bits"),
                                    py::arg("k"), py::arg("format"), py::arg("parts"), py::arg("workspace"),
                                    py::arg("workspace_bytes"), py::arg("device"), py::arg("stream"));
}

void bind_cuda(py::module_& m) {
  def_raw<&pyinf::cuda_device_count>(m, "cuda_device_count");
  bind_squared_gradients(m);
  bind_projections(m);
  bind_project_gradients(m);
  bind_scan(m);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pyinf. Pointers are integers; every kernel returns 0 or an error code (error_name).";
  m.def("build_config", &build_config, "How this extension was built, as a dict.");
  m.def("error_name", &error_name, py::arg("code"), "What a kernel's return code means.");
  m.attr("DTYPES") = py::dict(
      py::arg("float32") = static_cast<int>(pyinf::kFloat32), py::arg("float64") = static_cast<int>(pyinf::kFloat64),
      py::arg("float16") = static_cast<int>(pyinf::kFloat16), py::arg("bfloat16") = static_cast<int>(pyinf::kBFloat16));
  bind_cpu(m);
#ifdef PYINF_WITH_CUDA
  bind_cuda(m);
#endif
}
