// Which instruction sets this build holds and this processor runs.
#include <cstring>

#include "kernels.h"

namespace ff {
namespace portable {
extern const KernelTable table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
#elif defined(__aarch64__)
namespace neon {
extern const KernelTable table;
}
#endif

namespace {

struct Isa {
    const char* name;
    const KernelTable* table;
    bool runs;
};

struct Isas {
    Isa all[3];
    const char* names[4] = {};

    Isas() {
        int n = 0;
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        all[n++] = {"avx512", &avx512::table, has_avx512};
        all[n++] = {"avx2", &avx2::table, has_avx2};
#elif defined(__aarch64__)
        all[n++] = {"neon", &neon::table, true};
#endif
        all[n++] = {"portable", &portable::table, true};
        int listed = 0;
        for (int i = 0; i < n; ++i)
            if (all[i].runs) names[listed++] = all[i].name;
        for (; n < 3; ++n) all[n] = {"", nullptr, false};
    }
};

const Isas& isas() {
    static const Isas found;
    return found;
}

}  // namespace

const char* const* available_isas() { return isas().names; }

const KernelTable* kernel_table(const char* name) {
    for (const Isa& isa : isas().all)
        if (isa.runs && std::strcmp(isa.name, name) == 0) return isa.table;
    return nullptr;
}

}  // namespace ff
