// The small decompositions of the module _cuda.

#include <array>

#include "bind_cuda.h"

namespace py = pybind11;

namespace mergekernels {

namespace {

using ItemTuple = std::array<std::int64_t, 14>;

template <class T>
T* at(std::int64_t address) {
  return pointer<T>(static_cast<Address>(address));
}

void check_sides(std::int64_t p, std::int64_t s, bool eigh) {
  if (s < 1 || p < s || p > kMaxSide || (eigh && p != s))
    throw py::value_error("a small matrix is p x s with 128 >= p >= s >= 1");
}

template <class C>
py::bytes table(const std::vector<ItemTuple>& tuples) {
  std::vector<JacobiItem<C>> items(tuples.size());
  for (std::size_t i = 0; i < items.size(); ++i) {
    const ItemTuple& t = tuples[i];
    check_sides(t[12], t[13], false);
    if (t[0] == 0 || t[9] == 0 || t[11] == 0) throw py::value_error("an item needs a matrix, values and a report");
    JacobiItem<C>& item = items[i];
    item.matrix = {at<const C>(t[0]), t[1], t[2]};
    item.left = {at<C>(t[3]), t[4], t[5]};
    item.right = {at<C>(t[6]), t[7], t[8]};
    item.values = at<C>(t[9]);
    item.far = at<C>(t[10]);
    item.report = at<double>(t[11]);
    item.p = static_cast<std::int32_t>(t[12]);
    item.s = static_cast<std::int32_t>(t[13]);
  }
  return py::bytes(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(JacobiItem<C>));
}

template <class C>
void run(bool eigh, Address items, std::int64_t count, int threads, int size, const Queue& queue) {
  if (items == 0 || count < 1 || count >= std::int64_t(1) << 31 || size < 1)
    throw py::value_error("a launch needs a table, a count and memory");
  if (threads != 32 && threads != 256 && threads != 512) throw py::value_error("a block has 32, 256 or 512 threads");
  const JacobiArgs<C> args{pointer<const JacobiItem<C>>(items), count};
  const py::gil_scoped_release release;
  launch_jacobi(eigh, args, threads, size, queue);
}

}  // namespace

void bind_jacobi(py::module_& m) {
  m.attr("MAX_SIDE") = kMaxSide;
  m.def("jacobi_limit", [](int device) { return jacobi_limit(device); });
  m.def("jacobi_room", [](bool eigh, std::int64_t p, std::int64_t s, bool far, int compute) {
    check_sides(p, s, eigh);
    const int rows = static_cast<int>(p), columns = static_cast<int>(s);
    const std::int64_t size =
        compute == kF64 ? JacobiRoom<double>::size(rows, columns, far) : JacobiRoom<float>::size(rows, columns, far);
    return std::make_tuple(jacobi_threads(columns), size);
  });
  m.def("jacobi_table", [](const std::vector<ItemTuple>& items, int compute) {
    return compute == kF64 ? table<double>(items) : table<float>(items);
  });
  m.def("jacobi", [](bool eigh, Address items, std::int64_t count, int compute, int threads, int size, int device,
                     Address queue) {
    const auto start = compute == kF64 ? run<double> : run<float>;
    start(eigh, items, count, threads, size, Queue{device, pointer<void>(queue)});
  });
}

}  // namespace mergekernels
