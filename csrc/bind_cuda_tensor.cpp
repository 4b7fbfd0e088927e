// Least squares and products of stacks in the module _cuda.

#include <array>

#include "bind_cuda.h"

namespace py = pybind11;

namespace mergekernels {

namespace {

// (b, a, state, history, report, norm2)
using AlsTuple = std::tuple<Address, Address, Address, Address, Address, double>;
// (x, f, scale, owner, out, x_pitch, rows, depth, inner)
using ThinTuple = std::tuple<Address, Address, Address, Address, Address, std::int64_t, int, int, bool>;
// (p, s, ends, out, tasks)
using TaskTuple = std::tuple<Address, Address, Address, Address, std::int64_t>;

AlsShape to_shape(const std::array<std::int32_t, 5>& s) {
  for (const std::int32_t size : s)
    if (size < 1 || size > 1 << 15) throw py::value_error("a problem has sizes of 1 to 32768");
  return {s[0], s[1], s[2], s[3], s[4]};
}

template <class T>
py::bytes to_bytes(const std::vector<T>& items) {
  return py::bytes(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(T));
}

py::bytes als_table(const std::vector<AlsTuple>& tuples) {
  std::vector<AlsItem> items;
  for (const auto& [b, a, state, history, report, norm2] : tuples) {
    if (b == 0 || a == 0 || state == 0 || history == 0 || report == 0)
      throw py::value_error("a problem needs cores, a state, a history and a report");
    items.push_back({pointer<const double>(b), pointer<const double>(a), pointer<double>(state),
                     pointer<double>(history), pointer<double>(report), norm2});
  }
  return to_bytes(items);
}

template <class C>
std::pair<py::bytes, std::int64_t> thin_table(const std::vector<ThinTuple>& tuples, int width) {
  std::vector<ThinItem<C>> items;
  std::int64_t tiles = 0;
  for (const auto& [x, f, scale, owner, out, pitch, rows, depth, inner] : tuples) {
    if (rows < 1 || depth < 0 || out == 0 || (depth > 0 && (x == 0 || f == 0)) || (scale != 0 && owner == 0))
      throw py::value_error("a product needs sizes and addresses");
    items.push_back({pointer<const C>(x), pointer<const double>(f), pointer<const double>(scale),
                     pointer<const std::int32_t>(owner), pointer<double>(out), pitch, static_cast<std::int32_t>(tiles),
                     rows, depth, inner ? 1 : 0});
    tiles += thin_tiles(rows, width);
    if (tiles >= std::int64_t(1) << 31) throw py::value_error("too many tiles for one launch");
  }
  return {to_bytes(items), tiles};
}

template <class C>
void run_thin(Address items, int count, int width, std::int64_t tiles, const Queue& queue) {
  if (items == 0 || count < 1 || width < 1 || tiles < 1 || tiles >= std::int64_t(1) << 31)
    throw py::value_error("a launch needs a table, a width and tiles");
  const ThinArgs<C> args{pointer<const ThinItem<C>>(items), count, width, static_cast<std::int32_t>(tiles)};
  const py::gil_scoped_release release;
  launch_thin(args, queue);
}

}  // namespace

void bind_tensor(py::module_& m) {
  m.def("als_room", [](const std::array<std::int32_t, 5>& shape, bool far) { return als_room(to_shape(shape), far); });
  m.def("als_table", &als_table);
  m.def("als", [](Address items, std::int64_t count, const std::array<std::int32_t, 5>& shape, Address owner,
                  Address ends, double tol, double prox, int sweeps, bool search, bool far, int device, Address queue) {
    if (items == 0 || owner == 0 || ends == 0 || count < 1 || count >= std::int64_t(1) << 31 || sweeps < 1)
      throw py::value_error("a launch needs tables, a count and sweeps");
    const AlsArgs args{pointer<const AlsItem>(items),
                       pointer<const std::int32_t>(owner),
                       pointer<const std::int32_t>(ends),
                       count,
                       to_shape(shape),
                       tol,
                       prox,
                       sweeps,
                       search ? 1 : 0,
                       far ? 1 : 0};
    const py::gil_scoped_release release;
    launch_als(args, Queue{device, pointer<void>(queue)});
  });
  m.def("thin_table", [](const std::vector<ThinTuple>& items, int width, int compute) {
    return compute == kF64 ? thin_table<double>(items, width) : thin_table<float>(items, width);
  });
  m.def("thin", [](Address items, int count, int width, std::int64_t tiles, int compute, int device, Address queue) {
    const auto start = compute == kF64 ? run_thin<double> : run_thin<float>;
    start(items, count, width, tiles, Queue{device, pointer<void>(queue)});
  });
  m.def("task_table", [](const std::vector<TaskTuple>& tuples, int width) {
    std::vector<TaskItem> items;
    std::int64_t first = 0;
    for (const auto& [p, s, ends, out, tasks] : tuples) {
      if (p == 0 || s == 0 || ends == 0 || out == 0 || tasks < 1)
        throw py::value_error("sums need addresses and tasks");
      items.push_back({pointer<const double>(p), pointer<const double>(s), pointer<const std::int32_t>(ends),
                       pointer<double>(out), first});
      first += tasks * width;
    }
    return std::make_pair(to_bytes(items), first);
  });
  m.def("task_sums", [](Address items, int count, int width, std::int64_t elements, int device, Address queue) {
    if (items == 0 || count < 1 || width < 1 || elements < 1 || elements >= std::int64_t(1) << 38)
      throw py::value_error("a launch needs a table, a width and elements");
    const TaskArgs args{pointer<const TaskItem>(items), elements, count, width};
    const py::gil_scoped_release release;
    launch_task_sums(args, Queue{device, pointer<void>(queue)});
  });
}

}  // namespace mergekernels
