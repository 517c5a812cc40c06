#include "core/multi_tensor_cuda.cuh"
#include "ops/local_lipschitz/local_lipschitz_kernel.h"

namespace torch_ext::kernels {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = kLipschitzLanes;
constexpr int kRowsPerBlock = core::kThreads / kWarp;
constexpr int64_t kMaxGrid = int64_t{1} << 30;

template <typename T>
__device__ T at(const void* array, int64_t i) {
  return static_cast<const T*>(array)[i];
}
__device__ int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

template <typename T>
__device__ LipschitzEnds<T> ends_at(const LipschitzLinesWork& work, int64_t i) {
  return {at<T>(work.gl, i), at<T>(work.gu, i), at<T>(work.sl, i), at<T>(work.su, i)};
}

template <typename T>
__global__ void lines_kernel(const LipschitzLinesWork work) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = thread_index(); i < work.count; i += step) {
    const LipschitzLines<T> line = lipschitz_lines_of(ends_at<T>(work, i), work.constant);
    T* out = static_cast<T*>(work.lines) + i;
    out[0] = line.au;
    out[work.count] = line.iu;
    out[2 * work.count] = line.al;
    out[3 * work.count] = line.il;
  }
}

template <typename T>
__global__ void lines_gradient_kernel(const LipschitzLinesWork work) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = thread_index(); i < work.count; i += step) {
    const LipschitzLines<T> grad{at<T>(work.grad_lines, i), at<T>(work.grad_lines, work.count + i),
                                 at<T>(work.grad_lines, 2 * work.count + i),
                                 at<T>(work.grad_lines, 3 * work.count + i)};
    const LipschitzEnds<T> ends = lipschitz_lines_gradient(ends_at<T>(work, i), work.constant, grad);
    static_cast<T*>(work.grad_gl)[i] = ends.gl;
    static_cast<T*>(work.grad_gu)[i] = ends.gu;
    static_cast<T*>(work.grad_sl)[i] = ends.sl;
    static_cast<T*>(work.grad_su)[i] = ends.su;
  }
}

// Array `k` of the lines: with slopes au, iu, al, il, else iu, il.
template <typename T>
__device__ const T* line_of(const LipschitzRelaxWork& work, const void* base, int k, int64_t group) {
  return static_cast<const T*>(base) + (k * work.groups + group) * work.width;
}

template <typename T>
__device__ T warp_sum(T value) {  // the tree of the CPU's fold
  for (int half = kWarp / 2; half > 0; half /= 2) value += __shfl_down_sync(kAll, value, half);
  return value;
}

// A warp per row.
template <typename T, bool kSlopes, bool kMirror>
__global__ void relax_kernel(const LipschitzRelaxWork work) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  for (int64_t i = first; i < work.groups * work.rows; i += step) {
    const int64_t group = i / work.rows, row = i % work.rows, to = kMirror ? group * work.rows + i : i;
    const T* a = static_cast<const T*>(work.a) + (work.shared ? row : i) * work.width;
    const T* iu = line_of<T>(work, work.lines, kSlopes ? 1 : 0, group);
    const T* il = line_of<T>(work, work.lines, kSlopes ? 3 : 1, group);
    const T* au = line_of<T>(work, work.lines, 0, group);
    const T* al = line_of<T>(work, work.lines, kSlopes ? 2 : 0, group);
    T* out = static_cast<T*>(work.out) + (kSlopes ? to * work.width : 0);
    T* mirrored = out + (kSlopes && kMirror ? work.rows * work.width : 0);
    T up = 0, down = 0;
    for (int64_t h = lane; h < work.width; h += kWarp) {
      const T x = a[h];
      const bool above = x > 0, below = x < 0;
      up += x * (above ? iu[h] : il[h]);
      if (kSlopes) out[h] = x * (above ? au[h] : al[h]);
      if (kMirror) down -= x * (below ? iu[h] : il[h]);
      if (kSlopes && kMirror) mirrored[h] = -x * (below ? au[h] : al[h]);
    }
    up = warp_sum(up);
    if (kMirror) down = warp_sum(down);
    if (lane != 0) continue;
    static_cast<T*>(work.sums)[to] = up;
    if (kMirror) static_cast<T*>(work.sums)[to + work.rows] = down;
  }
}

// A thread per column of a group: the rows are added in order, as on the CPU.
template <typename T, bool kSlopes, bool kMirror>
__global__ void relax_gradient_kernel(const LipschitzRelaxWork work) {
  const int64_t columns = work.groups * work.width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t c = thread_index(); c < columns; c += step) {
    const int64_t group = c / work.width, h = c % work.width;
    const T iu = line_of<T>(work, work.lines, kSlopes ? 1 : 0, group)[h];
    const T il = line_of<T>(work, work.lines, kSlopes ? 3 : 1, group)[h];
    const T au = line_of<T>(work, work.lines, 0, group)[h];
    const T al = line_of<T>(work, work.lines, kSlopes ? 2 : 0, group)[h];
    T grad_au = 0, grad_iu = 0, grad_al = 0, grad_il = 0;
    for (int64_t row = 0; row < work.rows; ++row) {
      const int64_t i = group * work.rows + row, from = kMirror ? group * work.rows + i : i;
      const T x = at<T>(work.a, (work.shared ? row : i) * work.width + h);
      const bool above = x > 0, below = x < 0;
      const T sum = at<T>(work.grad_sums, from);
      T total = sum * (above ? iu : il);
      T d_iu = above ? x * sum : T(0), d_il = above ? T(0) : x * sum;
      if (kMirror) {
        const T mirrored_sum = at<T>(work.grad_sums, from + work.rows);
        total -= mirrored_sum * (below ? iu : il);
        d_iu -= below ? x * mirrored_sum : T(0);
        d_il -= below ? T(0) : x * mirrored_sum;
      }
      if (kSlopes) {
        const T grad = at<T>(work.grad_out, from * work.width + h);
        total += grad * (above ? au : al);
        T d_au = above ? x * grad : T(0), d_al = above ? T(0) : x * grad;
        if (kMirror) {
          const T mirrored = at<T>(work.grad_out, (from + work.rows) * work.width + h);
          total -= mirrored * (below ? au : al);
          d_au -= below ? x * mirrored : T(0);
          d_al -= below ? T(0) : x * mirrored;
        }
        grad_au += d_au;
        grad_al += d_al;
      }
      grad_iu += d_iu;
      grad_il += d_il;
      static_cast<T*>(work.grad_a)[i * work.width + h] = total;
    }
    T* to = static_cast<T*>(work.grad_lines) + c;
    if (kSlopes) {
      to[0] = grad_au;
      to[columns] = grad_iu;
      to[2 * columns] = grad_al;
      to[3 * columns] = grad_il;
    } else {
      to[0] = grad_iu;
      to[columns] = grad_il;
    }
  }
}

unsigned blocks_for(int64_t count, int64_t per_block) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid);
}

}  // namespace

void lipschitz_lines_cuda(const LipschitzLinesWork& work, core::DType type, void* stream) {
  if (work.count == 0) return;
  dispatch_lipschitz_type(type, [&](auto zero) {
    lines_kernel<decltype(zero)>
        <<<blocks_for(work.count, core::kThreads), core::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(work);
  });
  core::check_launch("lipschitz_lines");
}

void lipschitz_lines_gradient_cuda(const LipschitzLinesWork& work, core::DType type, void* stream) {
  if (work.count == 0) return;
  dispatch_lipschitz_type(type, [&](auto zero) {
    lines_gradient_kernel<decltype(zero)>
        <<<blocks_for(work.count, core::kThreads), core::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(work);
  });
  core::check_launch("lipschitz_lines_backward");
}

void lipschitz_relax_cuda(const LipschitzRelaxWork& work, core::DType type, void* stream) {
  const int64_t rows = work.groups * work.rows;
  if (rows == 0) return;
  dispatch_lipschitz_type(type, [&](auto zero) {
    dispatch_lipschitz_relax(work, [&](auto slopes, auto mirror) {
      relax_kernel<decltype(zero), decltype(slopes)::value, decltype(mirror)::value>
          <<<blocks_for(rows, kRowsPerBlock), core::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(work);
    });
  });
  core::check_launch("lipschitz_relax");
}

void lipschitz_relax_gradient_cuda(const LipschitzRelaxWork& work, core::DType type, void* stream) {
  const int64_t columns = work.groups * work.width;
  if (columns == 0) return;
  dispatch_lipschitz_type(type, [&](auto zero) {
    dispatch_lipschitz_relax(work, [&](auto slopes, auto mirror) {
      relax_gradient_kernel<decltype(zero), decltype(slopes)::value, decltype(mirror)::value>
          <<<blocks_for(columns, core::kThreads), core::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(work);
    });
  });
  core::check_launch("lipschitz_relax_backward");
}

}  // namespace torch_ext::kernels
