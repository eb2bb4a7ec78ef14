// Kernels that overlap: each is launched while the one before it on the stream runs to its end (programmatic dependent
// launch).
#pragma once

namespace mate::cuda::ptx {

/// Waits until all that the stream's earlier kernels have written is there. Before this a kernel writes no memory but
/// shared memory, and relies on nothing that it may have read, unless the kernel before has waited in its place
/// (side_by_side.h).
__device__ inline void await_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

/// Lets the stream's next kernel begin once all blocks of this one have said so, or ended.
__device__ inline void let_next_kernel_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

/// From here on a thread finds what had been written, wherever, when it was let begin.
__device__ inline void fence_acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

/// Both, for kernels that have nothing to do meanwhile.
__device__ inline void begin_overlapped() {
  let_next_kernel_begin();
  await_earlier_kernels();
}

}  // namespace mate::cuda::ptx
