// Products of stacks of low-rank updates, and their least squares, in the Python module _cpu.

#include <array>
#include <string>
#include <vector>

#include "bind_cpu.h"
#include "cpu/ops.h"

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// (b, at, ranks, c, u, v, out)
using MttkrpTuple = std::tuple<ViewTuple, ViewTuple, std::vector<std::int64_t>, Address, Address, Address, Address>;
// (b, a, state, history, report, norm2)
using AlsTuple = std::tuple<Address, Address, Address, Address, Address, double>;

}  // namespace

void bind_tensor(py::module_& m) {
  m.def(
      "mttkrp",
      [](const std::vector<MttkrpTuple>& modules, int mode, std::int64_t width, int threads, const std::string& isa) {
        const mk::Kernels& kernels = mk::kernels_of(isa);
        std::vector<mk::MttkrpItem> items;
        for (const auto& [b, a, ranks, c, u, v, out] : modules)
          items.push_back({to_view(b), to_view(a), ranks, at<const double>(c), at<const double>(u), at<const double>(v),
                           at<double>(out)});
        const py::gil_scoped_release release;
        mk::mttkrp(items, mode, width, threads, kernels);
      },
      py::arg("modules"), py::arg("mode"), py::arg("width"), py::arg("threads"), py::arg("isa"));
  m.def(
      "als",
      [](const std::vector<AlsTuple>& problems, const std::array<std::int32_t, 5>& shape, Address owner, Address ends,
         double tol, double prox, int sweeps, bool search, int threads, const std::string& isa) {
        const mk::Kernels& kernels = mk::kernels_of(isa);
        std::vector<mk::AlsItem> items;
        for (const auto& [b, a, state, history, report, norm2] : problems)
          items.push_back({at<const double>(b), at<const double>(a), at<double>(state), at<double>(history),
                           at<double>(report), norm2});
        mk::AlsArgs args{};
        args.items = items.data();
        args.owner = at<const std::int32_t>(owner);
        args.ends = at<const std::int32_t>(ends);
        args.count = static_cast<std::int64_t>(items.size());
        args.shape = {shape[0], shape[1], shape[2], shape[3], shape[4]};
        args.tol = tol;
        args.prox = prox;
        args.sweeps = sweeps;
        args.search = search ? 1 : 0;
        args.far = 1;
        const py::gil_scoped_release release;
        mk::als(args, threads, kernels);
      },
      py::arg("problems"), py::arg("shape"), py::arg("owner"), py::arg("ends"), py::arg("tol"), py::arg("prox"),
      py::arg("sweeps"), py::arg("search"), py::arg("threads"), py::arg("isa"));
}
