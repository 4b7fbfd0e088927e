// The general programs of the module _cuda: their tables, and the passes that read them.

#include <cstring>
#include <optional>

#include "bind_cuda.h"

namespace py = pybind11;

namespace mergekernels {

namespace {

int choice(const py::dict& d, const char* name, int end) {
  const int value = d[name].cast<int>();
  if (value < 0 || value >= end) throw py::value_error(std::string(name) + " of the program is out of its range");
  return value;
}

// Per-model numbers: none, or one for each model.
std::vector<double> numbers(const py::dict& d, const char* name, std::size_t num_models, double missing) {
  auto values = d[name].cast<std::vector<double>>();
  if (values.empty()) values.assign(num_models, missing);
  if (values.size() != num_models) throw py::value_error(std::string(name) + " has not one number for each model");
  return values;
}

template <class C>
Point<C> point_or_all(const std::optional<KeepTuple>& keep) {
  return keep ? to_point<C>(to_keep(*keep)) : pass_all<C>();
}

// (rule, point or None, top or None, draw threshold, address of marks, of masks, of thresholds)
using RuleTuple =
    std::tuple<int, std::optional<KeepTuple>, std::optional<KeepTuple>, std::uint64_t, Address, Address, Address>;

template <class C>
void set_rule(const RuleTuple& rule, ModelPlan<C>* model) {
  const auto& [kind, point, top, threshold, marks, masks, thresholds] = rule;
  if (kind < kRuleAll || kind > kRuleRank) throw py::value_error("a rule is out of its range");
  if ((kind == kRuleMarked && marks == 0) || (kind == kRuleRank && masks == 0))
    throw py::value_error("a rule that looks at marks has none");
  model->rule = kind;
  model->point = point_or_all<C>(point);
  model->top = point_or_all<C>(top);
  model->threshold = threshold;
  model->marks = pointer<const std::uint8_t>(marks);
  model->masks = pointer<const std::uint8_t>(masks);
  model->thresholds = pointer<const std::uint32_t>(thresholds);
}

template <class C>
void set_models(const py::dict& d, Plan<C>* p) {
  const auto weights = d["weights"].cast<std::vector<double>>();
  const std::size_t num_models = weights.size();
  if (num_models < 1 || num_models > kMaxModels) throw py::value_error("a program has 1 to 64 models");
  const auto rules = d["rules"].cast<std::vector<RuleTuple>>();
  const auto balance = d["balance"].cast<std::vector<std::vector<double>>>();
  const auto factors = numbers(d, "factors", num_models, 1.0), alone = numbers(d, "alone", num_models, 0.0),
             useful = numbers(d, "useful", num_models, 0.0);
  if (rules.size() != num_models || (balance.size() != num_models && !balance.empty()))
    throw py::value_error("a program has one rule for each model");
  p->num_models = static_cast<std::int32_t>(num_models);
  for (std::size_t m = 0; m < num_models; ++m) {
    ModelPlan<C>& model = p->models[m];
    set_rule(rules[m], &model);
    model.weight = static_cast<C>(weights[m]);
    model.factor = static_cast<C>(factors[m]);
    model.scaled = factors[m] != 1.0;
    model.alone = static_cast<C>(alone[m]);
    model.useful = static_cast<C>(useful[m]);
    if (balance.empty()) continue;
    if (balance[m].size() != 5) throw py::value_error("a balance has 5 fields");
    const auto at = [&](std::size_t i) { return static_cast<C>(balance[m][i]); };
    model.balance = {at(0), at(1), at(2), at(3), at(4)};
  }
}

// The table that the kernels read, as bytes without the models that are not there.
template <class C>
py::bytes make_plan(const py::dict& d) {
  auto p = std::make_unique<Plan<C>>();
  std::memset(static_cast<void*>(p.get()), 0, sizeof(Plan<C>));
  set_models(d, p.get());
  p->seed = d["seed"].cast<std::uint64_t>();
  p->tensor = d["tensor"].cast<std::uint32_t>();
  p->vote = choice(d, "vote", kVoteCount + 1);
  p->merge = choice(d, "merge", kMergeBalance + 1);
  p->divisor = choice(d, "divisor", kDivideByKept + 1);
  p->zero_vote = choice(d, "zero_vote", 3) - 1;
  p->subtract = d["subtract"].cast<bool>();
  p->anchor_first = d["anchor_first"].cast<bool>();
  p->has_alone = !d["alone"].cast<std::vector<double>>().empty();
  p->useful_at_least = d["useful_at_least"].cast<int>();
  p->marks_shift = choice(d, "marks_shift", 8);
  p->divisor_value = static_cast<C>(d["divisor_value"].cast<double>());
  const double floor = d["divisor_floor"].cast<double>(), scale = d["scale"].cast<double>();
  p->divisor_floor = static_cast<C>(floor);
  p->has_floor = floor > 0;
  p->scale = static_cast<C>(scale);
  p->scaled = scale != 1.0;
  p->epsilon = static_cast<C>(d["epsilon"].cast<double>());
  if (const auto limit = d["limit"].cast<std::optional<double>>()) {
    p->has_limit = 1;
    p->limit = static_cast<C>(*limit);
    p->limit_factor = static_cast<C>(*limit * 1e6);
    p->limit_below = *limit < 1e-6 ? static_cast<C>(1e-6) : C(0);
  }
  // (kind, point, address of the numbers of rows, length of a row)
  const auto joint = d["joint"].cast<std::tuple<int, std::optional<KeepTuple>, Address, std::int64_t>>();
  p->joint = std::get<0>(joint);
  p->joint_point = point_or_all<C>(std::get<1>(joint));
  p->rows = pointer<const C>(std::get<2>(joint));
  p->row_length = std::get<3>(joint);
  if (p->joint < kJointNone || p->joint > kJointImportance || (p->joint == kJointImportance && p->rows == nullptr))
    throw py::value_error("joint is out of its range");
  // (axis, address of the values, length, segments, tensor of the groups)
  const auto table = d["table"].cast<std::tuple<int, Address, std::int64_t, std::int64_t, std::uint32_t>>();
  p->axis = std::get<0>(table);
  p->table = pointer<const C>(std::get<1>(table));
  p->table_length = std::get<2>(table);
  p->segments = std::get<3>(table);
  p->table_tensor = std::get<4>(table);
  if (p->axis < kAxisNone || p->axis > kAxisGroups || (p->axis != kAxisNone && p->table == nullptr))
    throw py::value_error("table is out of its range");
  const std::size_t size =
      sizeof(Plan<C>) - (kMaxModels - static_cast<std::size_t>(p->num_models)) * sizeof(ModelPlan<C>);
  return py::bytes(reinterpret_cast<const char*>(p.get()), size);
}

template <class C>
ProgramArgs<C> program_args(Address plan, const Piece& piece, Address base, const std::vector<Address>& models,
                            Address out) {
  check_models(models);
  ProgramArgs<C> a{};
  a.n = piece.rows * piece.cols;
  a.piece = piece;
  a.plan = pointer<const Plan<C>>(plan);
  a.base = pointer<const void>(base);
  a.out = pointer<void>(out);
  a.num_inputs = static_cast<std::int32_t>(models.size());
  a.aligned = all_aligned(models, base, out);
  a.quads = is_quads(piece);
  for (std::size_t m = 0; m < models.size(); ++m) a.models[m] = pointer<const void>(models[m]);
  return a;
}

template <class C>
void run_program(ProgramArgs<C> a, int dtype, const Queue& queue) {
  const py::gil_scoped_release release;
  if (a.n > 0) launch_program(a, dtype, queue);
}

template <class C>
void program(Address plan, const PieceTuple& piece, Address base, const std::vector<Address>& models, Address out,
             int dtype, int out_dtype, Address counters, int slots, const Queue& queue) {
  ProgramArgs<C> a = program_args<C>(plan, to_piece(piece), base, models, out);
  a.out_dtype = out_dtype;
  a.counters = pointer<unsigned long long>(counters);
  a.slots = slots;
  if (counters != 0 && slots < 1) throw py::value_error("counters need at least one slot");
  run_program(a, dtype, queue);
}

template <class C>
void mark(Address plan, const PieceTuple& piece, Address base, const std::vector<Address>& models, int kind,
          const std::vector<Address>& marks, int dtype, const Queue& queue) {
  ProgramArgs<C> a = program_args<C>(plan, to_piece(piece), base, models, 0);
  if (kind < kMarkKept || kind > kMarkUseful || marks.empty() || marks.size() > kMaxModels)
    throw py::value_error("marks are of kind 1 (kept), 2 (agreeing) or 3 (useful), for 1 to 64 models");
  if (!is_flat(a.piece) || a.piece.g0 % 8 != 0) throw py::value_error("a piece to mark is flat and begins at a byte");
  a.mark = kind;
  for (std::size_t m = 0; m < marks.size(); ++m) a.marks[m] = pointer<std::uint8_t>(marks[m]);
  run_program(a, dtype, queue);
}

template <class C>
void reduce(Address plan, const PieceTuple& piece, Address base, const std::vector<Address>& models,
            const std::vector<std::pair<int, int>>& slots, int dtype, Address sums, const Queue& queue) {
  if (slots.empty() || slots.size() > kMaxSlots) throw py::value_error("too many sums, or none");
  ReduceArgs<C> a{};
  a.program = program_args<C>(plan, to_piece(piece), base, models, 0);
  a.sums = pointer<double>(sums);
  a.blocks = (a.program.n + kCanonicalBlock - 1) / kCanonicalBlock;
  a.num_slots = static_cast<std::int32_t>(slots.size());
  for (std::size_t s = 0; s < slots.size(); ++s) {
    const auto [quantity, model] = slots[s];
    if (quantity < kAbs || quantity > kMergedAbs || model < 0 || model >= static_cast<int>(models.size()))
      throw py::value_error("a sum is out of its range");
    a.quantity[s] = static_cast<std::int8_t>(quantity);
    a.model[s] = static_cast<std::int8_t>(model);
  }
  const py::gil_scoped_release release;
  if (a.program.n > 0) launch_reduce(a, dtype, queue);
}

// One item of a list, as bytes.
template <class C>
py::bytes list_item(Address plan, const PieceTuple& piece, Address base, const std::vector<Address>& models,
                    Address out, int out_dtype) {
  ProgramArgs<C> a = program_args<C>(plan, to_piece(piece), base, models, out);
  if (a.n < 1 || out == 0) throw py::value_error("an item of a list has elements and a place for its result");
  a.out_dtype = out_dtype;
  return py::bytes(reinterpret_cast<const char*>(&a), sizeof(a));
}

template <class C>
void program_list(Address items, Address tiles, std::int64_t num_tiles, Address bad, int dtype, const Queue& queue) {
  const ListArgs<C> a{pointer<const ProgramArgs<C>>(items), pointer<const TileOf>(tiles), pointer<std::uint32_t>(bad),
                      num_tiles};
  const py::gil_scoped_release release;
  if (num_tiles > 0) launch_list(a, dtype, queue);
}

}  // namespace

void bind_programs(py::module_& m) {
  m.def("plan", [](const py::dict& program, int compute) {
    return compute == kF64 ? make_plan<double>(program) : make_plan<float>(program);
  });
  m.def("program",
        [](Address plan, const PieceTuple& piece, Address base, const std::vector<Address>& models, Address out,
           int dtype, int out_dtype, int compute, Address counters, int slots, int device, Address queue) {
          check_code(dtype, "dtype");
          check_code(out_dtype, "out_dtype");
          const auto run = compute == kF64 ? program<double> : program<float>;
          run(plan, piece, base, models, out, dtype, out_dtype, counters, slots, Queue{device, pointer<void>(queue)});
        });
  m.attr("TILE") = kTileElements;
  m.def("list_item", [](Address plan, const PieceTuple& piece, Address base, const std::vector<Address>& models,
                        Address out, int out_dtype, int compute) {
    check_code(out_dtype, "out_dtype");
    const auto make = compute == kF64 ? list_item<double> : list_item<float>;
    return make(plan, piece, base, models, out, out_dtype);
  });
  m.def("program_list", [](Address items, Address tiles, std::int64_t num_tiles, Address bad, int dtype, int compute,
                           int device, Address queue) {
    check_code(dtype, "dtype");
    const auto run = compute == kF64 ? program_list<double> : program_list<float>;
    run(items, tiles, num_tiles, bad, dtype, Queue{device, pointer<void>(queue)});
  });
  m.def("mark", [](Address plan, const PieceTuple& piece, Address base, const std::vector<Address>& models, int kind,
                   const std::vector<Address>& marks, int dtype, int compute, int device, Address queue) {
    check_code(dtype, "dtype");
    const auto run = compute == kF64 ? mark<double> : mark<float>;
    run(plan, piece, base, models, kind, marks, dtype, Queue{device, pointer<void>(queue)});
  });
  m.def("reduce", [](Address plan, const PieceTuple& piece, Address base, const std::vector<Address>& models,
                     const std::vector<std::pair<int, int>>& slots, int dtype, int compute, Address sums, int device,
                     Address queue) {
    check_code(dtype, "dtype");
    const auto run = compute == kF64 ? reduce<double> : reduce<float>;
    run(plan, piece, base, models, slots, dtype, sums, Queue{device, pointer<void>(queue)});
  });
}

}  // namespace mergekernels
