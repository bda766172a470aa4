#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ff {

void parallel_for(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context) {
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_mutex;
    auto work = [&] {
        try {
            for (int64_t task = next++; task < tasks; task = next++) body(context, task);
        } catch (...) {
            std::lock_guard<std::mutex> lock(error_mutex);
            if (!error) error = std::current_exception();
            next = tasks;
        }
    };
    std::vector<std::thread> others;
    const int64_t wanted = std::min<int64_t>(threads, tasks) - 1;
    others.reserve(static_cast<size_t>(std::max<int64_t>(wanted, 0)));
    for (int64_t i = 0; i < wanted; ++i) {
        // A system that grants no further thread still gets the work done, by the threads there are.
        try {
            others.emplace_back(work);
        } catch (const std::system_error&) {
            break;
        }
    }
    work();
    for (auto& thread : others) thread.join();
    if (error) std::rethrow_exception(error);
}

namespace {

constexpr size_t LARGEST_KEPT = 4u << 20;
constexpr int KEPT = 16;

struct Shelf {
    struct Piece {
        void* memory = nullptr;
        size_t bytes = 0;
    };
    Piece pieces[KEPT];

    ~Shelf() {
        for (Piece& piece : pieces) std::free(piece.memory);
    }
};

thread_local Shelf shelf;

}  // namespace

void* take_scratch(size_t bytes) {
    Shelf::Piece* best = nullptr;
    for (Shelf::Piece& piece : shelf.pieces)
        if (piece.memory && piece.bytes == bytes) best = &piece;
    if (best) {
        void* memory = best->memory;
        best->memory = nullptr;
        return memory;
    }
    void* memory = std::aligned_alloc(64, bytes);
    if (!memory) throw std::bad_alloc();
    return memory;
}

void give_scratch(void* memory, size_t bytes) {
    if (bytes <= LARGEST_KEPT) {
        for (Shelf::Piece& piece : shelf.pieces) {
            if (!piece.memory) {
                piece.memory = memory;
                piece.bytes = bytes;
                return;
            }
        }
        std::free(shelf.pieces[bytes / 64 % KEPT].memory);
        shelf.pieces[bytes / 64 % KEPT].memory = memory;
        shelf.pieces[bytes / 64 % KEPT].bytes = bytes;
        return;
    }
    std::free(memory);
}

void advise_huge_pages(void* memory, size_t bytes) {
#ifdef __linux__
    constexpr uintptr_t HUGE = 2u << 20;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + HUGE - 1) / HUGE * HUGE;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / HUGE * HUGE;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

void fill_zero(void* memory, size_t bytes, int threads) {
    static constexpr size_t PIECE = 1u << 20;
    struct Range {
        char* first;
        size_t bytes;
    } range{static_cast<char*>(memory), bytes};
    const auto piece = [](void* context, int64_t task) {
        const Range& all = *static_cast<Range*>(context);
        const size_t from = static_cast<size_t>(task) * PIECE;
        std::memset(all.first + from, 0, std::min(PIECE, all.bytes - from));
    };
    parallel_for(static_cast<int64_t>((bytes + PIECE - 1) / PIECE), threads, piece, &range);
}

}  // namespace ff
