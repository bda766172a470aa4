// fastfisher._native: one function per op. Tensors come in as addresses, dtypes as the codes of ff::DType; shapes,
// strides and bounds were checked in Python. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#ifdef FF_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

const ff::KernelTable& table(const std::string& isa) {
    const ff::KernelTable* found = ff::kernel_table(isa.c_str());
    if (!found) throw std::invalid_argument("the instruction set " + isa + " is not available on this machine");
    return *found;
}

ff::Gradients gradients(Address data, int dtype, int64_t rows, int64_t row_stride) {
    return {at<const void>(data), static_cast<ff::DType>(dtype), rows, row_stride};
}

ff::Blocks block_ranges(Address range, int64_t count, int64_t size) { return {at<const int64_t>(range), count, size}; }

// Calls `body` with a null pointer of the state's type, float64 or float32.
template <class Body>
void with_state_type(bool is_double, Body body) {
    if (is_double) {
        body(static_cast<double*>(nullptr));
    } else {
        body(static_cast<float*>(nullptr));
    }
}

const ff::Kernels<double>& kernels_of(const ff::KernelTable& kernels, const double*) { return kernels.f64; }
const ff::Kernels<float>& kernels_of(const ff::KernelTable& kernels, const float*) { return kernels.f32; }

// The same with the CPU kernels of that type before it.
template <class Body>
void with_type(bool is_double, const std::string& isa, Body body) {
    const ff::KernelTable& kernels = table(isa);
    py::gil_scoped_release release;
    with_state_type(is_double, [&](auto* t) { body(kernels_of(kernels, t), t); });
}

#ifdef FF_CUDA
// The same ops on a GPU: the device and stream of the caller come first. A launch returns at once, so the GIL stays.
void define_cuda(py::module_& module) {
    const auto check = [](int code) {
        if (code != 0) throw std::runtime_error(std::string("CUDA: ") + ff::cuda::error_text(code));
    };

    module.def("cuda_spd_inverse", [=](int device, Address stream, bool is_double, Address matrix, int64_t count,
                                       int64_t size, double damping, Address condition, Address amplification) {
        with_state_type(is_double, [&](auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            check(ff::cuda::spd_inverse(at<T>(matrix), count, size, damping,
                                        {at<double>(condition), at<double>(amplification)},
                                        {device, at<void>(stream)}));
        });
    });
    module.def("cuda_inverse_from_grads",
               [=](int device, Address stream, bool is_double, Address f_inv, Address inv_diag, ff::Gradients g,
                   ff::Blocks blocks, double num_grads, double damping, Address condition, Address amplification) {
                   with_state_type(is_double, [&](auto* t) {
                       using T = std::remove_pointer_t<decltype(t)>;
                       check(ff::cuda::inverse_from_grads(at<T>(f_inv), at<T>(inv_diag), g, blocks, num_grads, damping,
                                                          {at<double>(condition), at<double>(amplification)},
                                                          {device, at<void>(stream)}));
                   });
               });
    module.def("cuda_sherman_morrison", [=](int device, Address stream, bool is_double, Address f_inv, ff::Gradients g,
                                            ff::Blocks blocks, double num_grads) {
        with_state_type(is_double, [&](auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            check(ff::cuda::sherman_morrison(at<T>(f_inv), g, blocks, num_grads, {device, at<void>(stream)}));
        });
    });
    module.def("cuda_fisher_accumulate", [=](int device, Address stream, bool is_double, Address fisher,
                                             ff::Gradients g, ff::Blocks blocks, double num_grads) {
        if (is_double) throw std::invalid_argument("fisher_accumulate is for float32");
        check(ff::cuda::fisher_accumulate(at<float>(fisher), g, blocks, num_grads, {device, at<void>(stream)}));
    });
    module.def("cuda_fishleg_block_step", [=](int device, Address stream, bool is_double, Address root, Address top,
                                              ff::Gradients g, ff::Blocks blocks, double num_grads, double damping,
                                              double rate, Address loss, Address largest) {
        with_state_type(is_double, [&](auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            check(ff::cuda::fishleg_block_step(at<T>(root), at<T>(top), g, blocks, num_grads, damping, rate,
                                               at<double>(loss), at<double>(largest), {device, at<void>(stream)}));
        });
    });
    module.def("cuda_obs_solve", [=](int device, Address stream, bool is_double, Address weight, Address f_inv,
                                     ff::Blocks blocks, Address mask, Address failed) {
        with_state_type(is_double, [&](auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            check(ff::cuda::obs_solve(at<T>(weight), at<const T>(f_inv), blocks, at<const uint8_t>(mask),
                                      at<uint8_t>(failed), {device, at<void>(stream)}));
        });
    });
}
#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
    using ff::Blocks;
    using ff::Gradients;

    py::class_<Gradients>(module, "Gradients")
        .def(py::init(&gradients), py::arg("data"), py::arg("dtype"), py::arg("rows"), py::arg("row_stride"));
    py::class_<Blocks>(module, "Blocks")
        .def(py::init(&block_ranges), py::arg("range"), py::arg("count"), py::arg("size"));
#ifdef FF_CUDA
    define_cuda(module);
#endif

    module.def("isas", [] {
        py::list names;
        for (const char* const* name = ff::available_isas(); *name; ++name) names.append(*name);
        return names;
    });

    module.def("advise_huge_pages",
               [](Address memory, size_t bytes) { ff::advise_huge_pages(at<void>(memory), bytes); });

    module.def("fill_zero", [](int threads, Address memory, size_t bytes) {
        py::gil_scoped_release release;
        ff::fill_zero(at<void>(memory), bytes, threads);
    });

    module.def("sherman_morrison", [](const std::string& isa, int threads, bool is_double, Address f_inv, Gradients g,
                                      Blocks blocks, double num_grads) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            kernels.sherman_morrison(at<std::remove_pointer_t<decltype(t)>>(f_inv), g, blocks, num_grads, threads);
        });
    });
    module.def("woodbury", [](const std::string& isa, int threads, bool is_double, Address f_inv, Gradients g,
                              Blocks blocks, double num_grads) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            kernels.woodbury(at<std::remove_pointer_t<decltype(t)>>(f_inv), g, blocks, num_grads, threads);
        });
    });
    module.def("fishleg_block_step",
               [](const std::string& isa, int threads, bool is_double, Address root, Address top, Gradients g,
                  Blocks blocks, double num_grads, double damping, double rate, Address loss, Address largest) {
                   with_type(is_double, isa, [&](auto& kernels, auto* t) {
                       using T = std::remove_pointer_t<decltype(t)>;
                       kernels.fishleg_block_step(at<T>(root), at<T>(top), g, blocks, num_grads, damping, rate,
                                                  at<double>(loss), at<double>(largest), threads);
                   });
               });
    module.def("fisher_accumulate", [](const std::string& isa, int threads, bool is_double, Address fisher, Gradients g,
                                       Blocks blocks, double num_grads) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            kernels.fisher_accumulate(at<std::remove_pointer_t<decltype(t)>>(fisher), g, blocks, num_grads, threads);
        });
    });
    module.def("spd_inverse", [](const std::string& isa, int threads, bool is_double, Address matrix, int64_t count,
                                 int64_t size, double damping, Address condition, Address amplification) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            kernels.spd_inverse(at<std::remove_pointer_t<decltype(t)>>(matrix), count, size, damping,
                                at<double>(condition), at<double>(amplification), threads);
        });
    });
    module.def("inverse_from_grads",
               [](const std::string& isa, int threads, bool is_double, Address f_inv, Address inv_diag, Gradients g,
                  Blocks blocks, double num_grads, double damping, Address condition, Address amplification) {
                   with_type(is_double, isa, [&](auto& kernels, auto* t) {
                       using T = std::remove_pointer_t<decltype(t)>;
                       kernels.inverse_from_grads(at<T>(f_inv), at<T>(inv_diag), g, blocks, num_grads, damping,
                                                  at<double>(condition), at<double>(amplification), threads);
                   });
               });
    module.def("dual_factor", [](const std::string& isa, int threads, Address factor, Gradients g, Blocks blocks,
                                 double num_grads, double damping, Address condition) {
        const ff::KernelTable& kernels = table(isa);
        py::gil_scoped_release release;
        kernels.dual_factor(at<double>(factor), g, blocks, num_grads, damping, at<double>(condition), threads);
    });
    module.def("inverse_diagonal",
               [](const std::string& isa, int threads, bool is_double, Address out, Address f_inv, Blocks blocks) {
                   with_type(is_double, isa, [&](auto& kernels, auto* t) {
                       using T = std::remove_pointer_t<decltype(t)>;
                       kernels.inverse_diagonal(at<T>(out), at<const T>(f_inv), blocks, threads);
                   });
               });
    module.def("inverse_diagonal_dual", [](const std::string& isa, int threads, bool is_double, Address out,
                                           Gradients g, Address factor, double damping, Blocks blocks) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            kernels.inverse_diagonal_dual(at<T>(out), {g, at<const double>(factor), damping}, blocks, threads);
        });
    });
    module.def("block_matvec", [](const std::string& isa, int threads, bool is_double, Address out, Address x,
                                  int64_t columns, Address f_inv, Blocks blocks) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            kernels.block_matvec(at<T>(out), at<const T>(x), columns, at<const T>(f_inv), blocks, threads);
        });
    });
    module.def("block_matvec_dual", [](const std::string& isa, int threads, bool is_double, Address out, Address x,
                                       int64_t columns, Gradients g, Address factor, double damping, Blocks blocks) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            kernels.block_matvec_dual(at<T>(out), at<const T>(x), columns, {g, at<const double>(factor), damping},
                                      blocks, threads);
        });
    });
    module.def("fisher_vector_product", [](const std::string& isa, int threads, bool is_double, Address out, Address x,
                                           int64_t columns, Gradients g, Blocks blocks, double num_grads) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            kernels.fisher_vector_product(at<T>(out), at<const T>(x), columns, g, blocks, num_grads, threads);
        });
    });
    module.def("factor_diagonal",
               [](const std::string& isa, int threads, bool is_double, Address out, Address root, Blocks blocks) {
                   with_type(is_double, isa, [&](auto& kernels, auto* t) {
                       using T = std::remove_pointer_t<decltype(t)>;
                       kernels.factor_diagonal(at<T>(out), at<const T>(root), blocks, threads);
                   });
               });
    module.def("block_factor_matvec", [](const std::string& isa, int threads, bool is_double, Address out, Address x,
                                         int64_t columns, Address root, Blocks blocks) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            kernels.block_factor_matvec(at<T>(out), at<const T>(x), columns, at<const T>(root), blocks, threads);
        });
    });
    module.def("factor_downdate",
               [](const std::string& isa, int threads, bool is_double, Address root, Blocks blocks, Address mask) {
                   with_type(is_double, isa, [&](auto& kernels, auto* t) {
                       using T = std::remove_pointer_t<decltype(t)>;
                       kernels.factor_downdate(at<T>(root), blocks, at<const uint8_t>(mask), threads);
                   });
               });
    module.def("kron_matvec",
               [](const std::string& isa, int threads, bool is_double, Address out, Address left, Address right,
                  Address scale, Address x, int64_t columns, int64_t tiles, int64_t o, int64_t i) {
                   with_type(is_double, isa, [&](auto& kernels, auto* t) {
                       using T = std::remove_pointer_t<decltype(t)>;
                       kernels.kron_matvec(at<T>(out), at<const T>(left), at<const T>(right), at<const T>(scale),
                                           at<const T>(x), columns, tiles, o, i, threads);
                   });
               });
    module.def(
        "conv_weight_grads", [](const std::string& isa, int threads, bool is_double, Address rows, int64_t row_stride,
                                Address x, Address g, int64_t samples, int64_t groups, int64_t in, int64_t out,
                                const std::array<std::array<int64_t, 2>, 6>& sizes, bool x_last, bool g_last) {
            ff::Convolution conv{samples, groups, in, out, {}, {}, {}, {}, {}, {}, x_last, g_last};
            int64_t* fields[] = {conv.size, conv.out_size, conv.kernel, conv.stride, conv.padding, conv.dilation};
            for (size_t i = 0; i < sizes.size(); ++i) std::copy(sizes[i].begin(), sizes[i].end(), fields[i]);
            with_type(is_double, isa, [&](auto& kernels, auto* t) {
                using T = std::remove_pointer_t<decltype(t)>;
                kernels.conv_weight_grads(at<T>(rows), row_stride, at<const T>(x), at<const T>(g), conv, threads);
            });
        });
    module.def("obs_saliency", [](const std::string& isa, int threads, bool is_double, Address out, Address weight,
                                  Address inv_diag, int64_t count) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            kernels.obs_saliency(at<T>(out), at<const T>(weight), at<const T>(inv_diag), count, threads);
        });
    });
    module.def("prune_mask", [](const std::string& isa, int threads, bool is_double, Address mask, Address invalid,
                                Address saliency, Address dead, int64_t count, int64_t num_zeros) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            kernels.prune_mask(at<uint8_t>(mask), at<int64_t>(invalid), at<const T>(saliency), at<const uint8_t>(dead),
                               count, num_zeros, threads);
        });
    });
    module.def("obs_update", [](const std::string& isa, int threads, bool is_double, Address weight, Address f_inv,
                                Address inv_diag, int64_t count, Blocks blocks, Address mask) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            kernels.obs_update(at<T>(weight), at<const T>(f_inv), at<const T>(inv_diag), count, blocks,
                               at<const uint8_t>(mask), threads);
        });
    });
    module.def("obs_update_dual",
               [](const std::string& isa, int threads, bool is_double, Address weight, Gradients g, Address factor,
                  double damping, Address inv_diag, int64_t count, Blocks blocks, Address mask) {
                   with_type(is_double, isa, [&](auto& kernels, auto* t) {
                       using T = std::remove_pointer_t<decltype(t)>;
                       kernels.obs_update_dual(at<T>(weight), {g, at<const double>(factor), damping},
                                               at<const T>(inv_diag), count, blocks, at<const uint8_t>(mask), threads);
                   });
               });
    module.def("obs_eliminate", [](const std::string& isa, int threads, bool is_double, Address order, Address loss,
                                   Address failed, Address weight, Address f_inv, Blocks blocks, Address groups,
                                   int64_t keep, int64_t together) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            kernels.obs_eliminate(at<int64_t>(order), at<double>(loss), at<uint8_t>(failed), at<const T>(weight),
                                  at<const T>(f_inv), blocks, at<const int64_t>(groups), keep, together, threads);
        });
    });
    module.def("obs_eliminate_dual", [](const std::string& isa, int threads, bool is_double, Address order,
                                        Address loss, Address failed, Address weight, Gradients g, Address factor,
                                        double damping, Blocks blocks, Address groups, int64_t keep, int64_t together) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            kernels.obs_eliminate_dual(at<int64_t>(order), at<double>(loss), at<uint8_t>(failed), at<const T>(weight),
                                       ff::Dual{g, at<const double>(factor), damping}, blocks,
                                       at<const int64_t>(groups), keep, together, threads);
        });
    });
    module.def("obs_solve", [](const std::string& isa, int threads, bool is_double, Address weight, Address f_inv,
                               Blocks blocks, Address mask, Address failed) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            kernels.obs_solve(at<T>(weight), at<const T>(f_inv), blocks, at<const uint8_t>(mask), at<uint8_t>(failed),
                              threads);
        });
    });
    module.def("obs_solve_dual", [](const std::string& isa, int threads, bool is_double, Address weight, Gradients g,
                                    Blocks blocks, double num_grads, double damping, Address mask, Address failed) {
        with_type(is_double, isa, [&](auto& kernels, auto* t) {
            using T = std::remove_pointer_t<decltype(t)>;
            kernels.obs_solve_dual(at<T>(weight), g, blocks, num_grads, damping, at<const uint8_t>(mask),
                                   at<uint8_t>(failed), threads);
        });
    });
}
