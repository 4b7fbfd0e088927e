#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "common/team.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"

namespace mergekernels {

namespace {

// Rows or columns of one unit of work.
constexpr std::int64_t kStretch = 64;

std::int64_t rounded(std::int64_t x) { return (x + kThinWidth - 1) / kThinWidth * kThinWidth; }

// A factor with rows of whole vectors: itself, or a copy with zeros.
struct Padded {
  Padded(const double* f, std::int64_t rows, std::int64_t width) : data(f) {
    const std::int64_t pitch = rounded(width);
    if (pitch == width) return;
    copy = std::make_unique<Scratch>(rows * pitch * 8);
    double* const to = reinterpret_cast<double*>(copy->data());
    for (std::int64_t i = 0; i < rows; ++i) {
      std::copy(f + i * width, f + (i + 1) * width, to + i * pitch);
      std::fill(to + i * pitch + width, to + (i + 1) * pitch, 0.0);
    }
    data = to;
  }
  const double* data;
  std::unique_ptr<Scratch> copy;
};

// One module: P = A V and S = B^T U, those that the mode needs, and what comes of them.
struct Work {
  Work(const MttkrpItem& i, int mode, std::int64_t w) : item(i), width(w), pitch(rounded(w)) {
    ranks = std::accumulate(i.ranks.begin(), i.ranks.end(), std::int64_t(0));
    for (std::size_t t = 0; t < i.ranks.size(); ++t) owner.insert(owner.end(), i.ranks[t], std::int64_t(t));
    if (mode != 2) v = std::make_unique<Padded>(i.v, i.at.shape[0], w);
    if (mode != 1) u = std::make_unique<Padded>(i.u, i.b.shape[0], w);
    small = std::make_unique<Scratch>(2 * ranks * pitch * 8);
    p = reinterpret_cast<double*>(small->data());
    s = p + ranks * pitch;
    rows = mode == 0 ? std::int64_t(i.ranks.size()) : mode == 1 ? i.b.shape[0] : i.at.shape[0];
  }
  const MttkrpItem& item;
  std::int64_t width, pitch, ranks, rows;
  std::vector<std::int64_t> owner;
  std::unique_ptr<Padded> u, v;
  std::unique_ptr<Scratch> small;
  double *p, *s;

  // Stacked columns first .. of x^T f, times C of their tasks where `scale` is set.
  void inner(const View& x, const double* f, std::int64_t first, double* to, bool scale, const Kernels& kernels) const {
    const std::int64_t count = std::min(kStretch, ranks - first), item_size = itemsize(x.dtype);
    double* const out = to + first * pitch;
    const ThinArgs args{x.data + first * item_size, f, out, x.shape[0], count, ranks, pitch, pitch, pitch, 1, x.dtype};
    kernels.thin(&args);
    for (std::int64_t r = 0; scale && r < count; ++r) {
      const double* const c = item.c + owner[static_cast<std::size_t>(first + r)] * width;
      for (std::int64_t k = 0; k < width; ++k) out[r * pitch + k] *= c[k];
    }
  }

  // Rows first .. of x times what `inner` left.
  void outer(const View& x, const double* from, std::int64_t first, const Kernels& kernels) const {
    const std::int64_t count = std::min(kStretch, rows - first);
    const char* const at = x.data + first * ranks * itemsize(x.dtype);
    double* const out = item.out + first * width;
    if (pitch == width) {
      const ThinArgs args{at, from, out, count, ranks, ranks, pitch, pitch, pitch, 0, x.dtype};
      kernels.thin(&args);
      return;
    }
    const Scratch scratch(count * pitch * 8);
    double* const wide = reinterpret_cast<double*>(scratch.data());
    const ThinArgs args{at, from, wide, count, ranks, ranks, pitch, pitch, pitch, 0, x.dtype};
    kernels.thin(&args);
    for (std::int64_t i = 0; i < count; ++i) std::copy(wide + i * pitch, wide + i * pitch + width, out + i * width);
  }

  void total() const {
    std::int64_t r = 0;
    for (std::size_t t = 0; t < item.ranks.size(); ++t) {
      double* const out = item.out + std::int64_t(t) * width;
      std::fill(out, out + width, 0.0);
      for (const std::int64_t end = r + item.ranks[t]; r < end; ++r)
        for (std::int64_t k = 0; k < width; ++k) out[k] += p[r * pitch + k] * s[r * pitch + k];
    }
  }
};

// Stretches of every module one after another; begins[i]: the first of module i.
std::vector<std::int64_t> begins(const std::vector<Work>& works, bool of_ranks) {
  std::vector<std::int64_t> found{0};
  for (const Work& w : works) found.push_back(found.back() + ((of_ranks ? w.ranks : w.rows) + kStretch - 1) / kStretch);
  return found;
}

template <class F>
void each_stretch(const std::vector<Work>& works, bool of_ranks, int threads, const F& f) {
  const std::vector<std::int64_t> firsts = begins(works, of_ranks);
  parallel_ranges(firsts.back(), 1, threads, [&](std::int64_t begin, std::int64_t end) {
    const DefaultFloatEnvironment environment;
    for (; begin < end; ++begin) {
      const auto module = std::upper_bound(firsts.begin(), firsts.end(), begin) - firsts.begin() - 1;
      f(works[static_cast<std::size_t>(module)], (begin - firsts[static_cast<std::size_t>(module)]) * kStretch);
    }
  });
}

void check(const MttkrpItem& item) {
  const std::int64_t ranks = std::accumulate(item.ranks.begin(), item.ranks.end(), std::int64_t(0));
  for (const View* x : {&item.b, &item.at}) {
    if (x->shape.size() != 2 || x->shape[1] != ranks || (x->dtype != kF32 && x->dtype != kF64))
      throw std::invalid_argument("a stack is two matrices of R columns, float32 or float64");
    if (x->shape[0] > 0 && ranks > 0 && !Reader(*x).contiguous()) throw std::invalid_argument("stacks are contiguous");
  }
  if (std::any_of(item.ranks.begin(), item.ranks.end(), [](std::int64_t r) { return r < 0; }))
    throw std::invalid_argument("a rank is negative");
}

}  // namespace

void mttkrp(const std::vector<MttkrpItem>& items, int mode, std::int64_t width, int threads, const Kernels& kernels) {
  if (mode < 0 || mode > 2 || width < 0) throw std::invalid_argument("the mode is 0, 1 or 2");
  for (const MttkrpItem& item : items) check(item);
  if (width == 0) return;
  std::vector<Work> works;
  works.reserve(items.size());
  std::int64_t bytes = 0;
  for (const MttkrpItem& item : items) {
    works.emplace_back(item, mode, width);
    bytes += works.back().ranks * (item.b.shape[0] + item.at.shape[0]) * 8;
  }
  const int team = team_size(threads, bytes);
  each_stretch(works, true, team, [&](const Work& w, std::int64_t first) {
    if (mode != 2) w.inner(w.item.at, w.v->data, first, w.p, mode == 1, kernels);
    if (mode != 1) w.inner(w.item.b, w.u->data, first, w.s, mode == 2, kernels);
  });
  if (mode == 0) {
    for (const Work& w : works) w.total();
    return;
  }
  each_stretch(works, false, team, [&](const Work& w, std::int64_t first) {
    w.outer(mode == 1 ? w.item.b : w.item.at, mode == 1 ? w.p : w.s, first, kernels);
  });
}

}  // namespace mergekernels
