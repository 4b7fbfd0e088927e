#include "cpu/kernels.h"

namespace mergekernels {

namespace base {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

const Kernels* const* available_kernels(int* count) {
  struct Table {
    const Kernels* entries[3];
    int count = 0;
    Table() {
#if defined(MK_WITH_AVX512)
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl") && has_v3())
        entries[count++] = &avx512::kernels;
#endif
#if defined(MK_WITH_AVX2)
      if (has_v3()) entries[count++] = &avx2::kernels;
#endif
      entries[count++] = &base::kernels;
    }
#if defined(MK_WITH_AVX2)
    // What -march=x86-64-v3 lets the compiler use, as far as the compiler can name it.
    static bool has_v3() {
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
             __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
    }
#endif
  };
  static const Table table;
  *count = table.count;
  return table.entries;
}

}  // namespace mergekernels
