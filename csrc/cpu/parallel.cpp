#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

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

}  // namespace ff
