// Tasks over threads. Which thread runs a task is not fixed; what a task computes is, and tasks write disjoint memory:
// so results do not depend on the number of threads.
#pragma once
#include <cstdint>

namespace ff {

// Runs body(context, task) for every task in 0 .. tasks - 1 on at most `threads` threads, this one included.
// The first exception thrown by a task is rethrown here after all threads have stopped.
void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context);

}  // namespace ff
