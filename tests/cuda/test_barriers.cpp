// Takes the barriers of every kernel away, one at a time: each must be missed, by another result under at least one of
// a few orders of the threads. A barrier that is not missed is either superfluous or its absence would not be noticed.
#include "problems.h"

namespace {

using namespace problems;

constexpr uint32_t ORDERS = 5;
int kernels = 0, barriers = 0, unnoticed = 0;

template <class T>
void take_away(Op op, const Problem& p) {
    emulate::Machine& machine = emulate::machine;
    const Run<T> run(op, p);
    machine.sites.clear();
    const Output<T> want = run();
    run.judge(want);
    ++kernels;
    for (size_t site = 0; site < machine.sites.size(); ++site) {
        machine.switched_off = static_cast<int>(site);
        bool noticed = false;
        for (machine.seed = 1; machine.seed <= ORDERS && !noticed; ++machine.seed) noticed = !(run() == want);
        ++barriers;
        unnoticed += !noticed;
        if (!noticed)
            std::printf("nobody misses the barrier at %s: %s, %s\n", machine.sites[site].text().c_str(), run.name(),
                        p.text().c_str());
    }
    machine.switched_off = -1;
}

}  // namespace

int main() {
    // One size of block for each way of cutting it into tiles, and more gradients than are summed up in one go.
    for (const int64_t B : {16, 40, 100, 140}) {
        Problem p = check::make_problem(B, 2 * B - 3, 9);
        p.seed = static_cast<uint32_t>(B);
        take_away<float>(Op::spd_inverse, p);
        take_away<double>(Op::spd_inverse, p);
    }
    Problem p = check::make_problem(140, 275, 139);
    p.seed = 7;
    for (const Op op : {Op::inverse_from_grads, Op::inverse_diagonal_from_grads, Op::sherman_morrison}) {
        take_away<float>(op, p);
        take_away<double>(op, p);
    }
    std::printf("%d of %d barriers in %d kernels are missed\n", barriers - unnoticed, barriers, kernels);
    return unnoticed > 0;
}
