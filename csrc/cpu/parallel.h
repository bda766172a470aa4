// Tasks over threads. Which thread runs a task is not fixed; what a task computes is, and tasks write disjoint memory:
// so results do not depend on the number of threads.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ff {

// Runs body(context, task) for every task in 0 .. tasks - 1 on at most `threads` threads, this one included.
// The first exception thrown by a task is rethrown here after all threads have stopped.
void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context);

// Memory for one task, 64-byte aligned. Each thread keeps what its last tasks gave back (pieces up to a few MiB),
// because fresh pages cost more than the work of a small block. Throws std::bad_alloc.
void* take_scratch(size_t bytes);
void give_scratch(void* memory, size_t bytes);

// Asks the system for huge pages behind fresh memory: touching it for the first time then costs a third. Only a hint.
void advise_huge_pages(void* memory, size_t bytes);

// Writes zeros.
void fill_zero(void* memory, size_t bytes, int threads);

}  // namespace ff
