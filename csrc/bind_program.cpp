#include "bind_program.h"

#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

namespace py = pybind11;

namespace mergekernels {

namespace {

using PointTuple = std::tuple<std::uint64_t, int, std::uint32_t, std::int64_t>;

void require(bool fine, const std::string& what) {
  if (!fine) throw py::value_error("program: " + what);
}

// Reads the fields of a dict by name; every one must be read once.
class Fields {
 public:
  explicit Fields(const py::dict& dict) : dict_(dict) {}

  py::object raw(const char* name) {
    require(dict_.contains(name), std::string("the field ") + name + " is missing");
    ++read_;
    return dict_[name];
  }

  template <class T>
  T get(const char* name) {
    try {
      return raw(name).cast<T>();
    } catch (const py::cast_error&) {
      throw py::value_error(std::string("program: the field ") + name + " has another type");
    }
  }

  int code(const char* name, int last) {
    const int value = get<int>(name);
    require(value >= 0 && value <= last, std::string(name) + " is not one of its codes");
    return value;
  }

  // One number per model, or none; whether there are any.
  bool numbers(const char* name, int num_models, double* into) {
    const auto values = get<std::vector<double>>(name);
    require(values.empty() || static_cast<int>(values.size()) == num_models,
            std::string(name) + " has another number of entries than weights");
    std::copy(values.begin(), values.end(), into);
    return !values.empty();
  }

  void end() const { require(read_ == dict_.size(), "unknown fields"); }

 private:
  const py::dict& dict_;
  std::size_t read_ = 0;
};

KeepPoint to_point(const PointTuple& tuple) {
  const auto& [tau, ties, word, index] = tuple;
  require(ties >= kTiesAll && ties <= kTiesIndex, "ties are 0 (all) to 3 (index)");
  return {tau, index, word, ties, 1};
}

KeepPoint to_optional_point(const py::handle& object) {
  return object.is_none() ? KeepPoint{} : to_point(object.cast<PointTuple>());
}

KeepRule to_rule(const py::handle& object) {
  KeepRule rule{};
  if (object.is_none()) return rule;
  const auto t = object.cast<py::tuple>();
  static constexpr std::size_t sizes[] = {0, 2, 3, 3, 1, 5, 3};
  require(t.size() > 0, "a rule is None or a tuple that begins with its kind");
  rule.kind = t[0].cast<int>();
  require(rule.kind >= kRulePoint && rule.kind <= kRuleRankBand && t.size() == sizes[rule.kind],
          "a rule of keep is malformed");
  constexpr std::uint64_t certain = 1ull << 32;
  switch (rule.kind) {
    case kRulePoint:
      rule.point = to_point(t[1].cast<PointTuple>());
      break;
    case kRuleBand:
      rule.point = to_optional_point(t[1]);
      rule.top = to_point(t[2].cast<PointTuple>());
      break;
    case kRuleDraw:
      rule.low = t[1].cast<std::uint64_t>();
      require(rule.low <= certain, "the threshold of a draw is above 2^32");
      rule.point = to_optional_point(t[2]);
      break;
    case kRuleRankDraw:
      rule.low = t[1].cast<std::uint64_t>();
      rule.span = t[2].cast<std::uint64_t>();
      rule.single = t[3].cast<std::uint64_t>();
      rule.divide = t[4].cast<bool>();
      require(rule.low <= certain && rule.span <= certain - rule.low && rule.single <= certain,
              "a threshold of a draw by rank is above 2^32");
      break;
    case kRuleRankBand:
      rule.first = t[1].cast<std::int64_t>();
      rule.last = t[2].cast<std::int64_t>();
      require(rule.first >= 0 && rule.first <= rule.last, "a band of ranks is empty by mistake");
      break;
    default:
      break;
  }
  return rule;
}

// (axis, length, tensor, values): a buffer of doubles, `models` per segment.
Table to_table(const py::handle& object, int models, std::vector<py::buffer_info>* held) {
  Table table{};
  if (object.is_none()) return table;
  const auto t = object.cast<py::tuple>();
  require(t.size() == 4, "a table has 4 fields");
  table.axis = t[0].cast<int>();
  table.length = t[1].cast<std::int64_t>();
  table.tensor = t[2].cast<std::uint32_t>();
  require(table.axis >= kTableRows && table.axis <= kTableGroups && table.length >= 1, "a table is malformed");
  held->push_back(t[3].cast<py::buffer>().request());
  const py::buffer_info& info = held->back();
  require(info.itemsize == sizeof(double) && info.ndim == 1 && info.format == py::format_descriptor<double>::format() &&
              (info.size <= 1 || info.strides[0] == sizeof(double)),
          "the numbers of a table are a contiguous buffer of float64");
  require(info.size > 0 && info.size % models == 0, "a table needs as many numbers for each model");
  table.segments = info.size / models;
  require(table.axis == kTableRows || table.segments == table.length, "a table needs one number per segment");
  table.values = static_cast<const double*>(info.ptr);
  return table;
}

}  // namespace

BoundProgram::BoundProgram(const py::dict& dict) : program() {
  Fields fields(dict);
  Program& p = program;
  const auto weights = fields.get<std::vector<double>>("weights");
  require(!weights.empty() && weights.size() <= kMaxModels, "weights are 1 to 64 numbers");
  p.num_models = static_cast<int>(weights.size());
  std::copy(weights.begin(), weights.end(), p.weights);
  const auto keep = fields.get<py::list>("keep");
  require(keep.size() == weights.size(), "keep has another number of entries than weights");
  bool ranks = false;
  for (std::size_t m = 0; m < weights.size(); ++m) {
    p.keep[m] = to_rule(keep[m]);
    ranks = ranks || ranked(p.keep[m]);
  }
  p.has_base = fields.get<bool>("base");
  p.subtract = fields.get<bool>("subtract");
  p.anchor_first = fields.get<bool>("anchor_first");
  p.copy = fields.get<bool>("copy");
  p.vote = fields.code("vote", kVoteCount);
  p.zero_vote = fields.get<int>("zero_vote");
  require(p.zero_vote >= -1 && p.zero_vote <= 1, "zero_vote is -1, 0 or 1");
  p.merge = fields.code("merge", kMergeBalance);
  p.num_inputs = p.num_models * (p.merge == kMergeImportance ? 2 : 1);
  require(p.num_inputs <= kMaxModels, "merge importance takes at most 32 models");
  p.divisor = fields.code("divisor", kDivisorKeptCount);
  p.divisor_value = fields.get<double>("divisor_value");
  p.divisor_floor = fields.get<double>("divisor_floor");
  p.scale = fields.get<double>("scale");
  p.epsilon = fields.get<double>("epsilon");
  p.seed = fields.get<std::uint64_t>("seed");
  p.tensor = fields.get<std::uint32_t>("tensor");
  p.has_factors = fields.numbers("factors", p.num_models, p.factors);
  p.has_alone = fields.numbers("alone", p.num_models, p.alone);
  const auto limit = fields.get<std::optional<double>>("limit");
  p.has_limit = limit.has_value();
  p.limit = limit.value_or(0.0);
  p.has_useful = fields.numbers("thresholds", p.num_models, p.thresholds);
  p.at_least = fields.get<int>("at_least");
  const auto balance = fields.get<std::vector<std::tuple<double, double, double, double, double>>>("balance");
  require(balance.size() == (p.merge == kMergeBalance ? weights.size() : 0),
          "balance has one entry per weight with that merge, else none");
  for (std::size_t m = 0; m < balance.size(); ++m) {
    const auto& [lo, hi, spread, cut, top] = balance[m];
    p.balance[m] = {lo, hi, spread, cut, top};
  }
  p.joint = to_optional_point(fields.raw("joint"));
  p.importance = to_table(fields.raw("importance"), 1, &held);
  require(p.importance.axis == kTableNone || (p.importance.axis == kTableRows && p.num_models == 1 && p.joint.active),
          "importance is one number per row, with one model and a joint point");
  p.table = to_table(fields.raw("table"), p.num_models, &held);
  const auto rows = fields.get<std::pair<std::int64_t, std::int64_t>>("rows");
  p.row_length = rows.first;
  p.row_stride = rows.second;
  require(!ranks || (p.row_length >= 1 && p.row_stride >= 1), "rules by rank need rows");
  require(p.vote != kVoteNone ||
              (p.merge != kMergeMax && p.divisor != kDivisorAgreeingWeights && p.divisor != kDivisorAgreeingCount),
          "a vote is missing");
  fields.end();
}

}  // namespace mergekernels
