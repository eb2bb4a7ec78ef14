// Two launches that run side by side, for the long and the short sequences of a call: see Sequences.
#pragma once

#include "forward_arguments.h"
#include "ptx/launch.h"
#include "warp.h"

namespace mate::cuda {

/// At the beginning of a kernel.
__device__ inline void let_next_begin_at_once(const ForwardArguments& a) {
  if (a.served.which != Sequences::long_ones) ptx::let_next_kernel_begin();
}

/// Waits until what a kernel reads is there. For that of the short sequences it is from the beginning on, since that of
/// the long ones, whose end is nothing to it, has waited before it let it begin.
__device__ inline void await_inputs(const ForwardArguments& a) {
  if (a.served.which == Sequences::short_ones) return;
  ptx::await_earlier_kernels();
  if (a.served.which == Sequences::long_ones) ptx::let_next_kernel_begin();
}

/// At the end of a kernel: what comes after waits for the end of the second one, which must not be before the first's.
__device__ inline void await_other(const ForwardArguments& a) {
  if (a.served.which == Sequences::short_ones && blockIdx.x == 0) ptx::await_earlier_kernels();
}

/// Whether sequence b is this launch's.
__device__ inline bool serves(const ForwardArguments& a, int b) {
  if (a.served.which == Sequences::all) return true;
  const bool is_short = used_queries(a.problem.queries, b) <= a.served.short_rows;
  return is_short == (a.served.which == Sequences::short_ones);
}

/// Of `workers` blocks of threads, how many have something to do.
__device__ inline int workers_of_launch(const ForwardArguments& a, int workers) {
  if (a.served.which == Sequences::all) return workers;
  const int of_long = __ldcg(a.served.long_workers);
  return clamp(a.served.which == Sequences::long_ones ? of_long : workers - of_long, 1, workers);
}

/// What the sequences of a launch take, as multiples of the time in which a multiprocessor decodes 128 keys.
struct TimeOfTiles {
  static constexpr float never = 3e38F;
  float all = 0;
  float longest = 0;  ///< of a tile
  float shortest = never;
  int tiles = 0;

  __device__ void add(int count, float first, float last) {
    if (count == 0) return;
    all += static_cast<float>(count) * (first + last) / 2;
    longest = fmaxf(longest, fmaxf(first, last));
    shortest = fminf(shortest, fminf(first, last));
    tiles += count;
  }
  __device__ TimeOfTiles of_warp() const {
    return {warp_sum(all), warp_max(longest), -warp_max(-shortest), warp_sum(tiles)};
  }
  /// Until the last of `workers` is done, where each tile of `units` is one worker's as a whole, or may be cut.
  __device__ float until_done(int units, int workers, bool whole) const {
    const float even = all * static_cast<float>(units) / static_cast<float>(workers);
    if (!whole || tiles == 0) return even;
    const int rounds = divide(tiles * units - 1, workers) + 1;
    return fmaxf(longest, fminf(static_cast<float>(rounds) * longest, even + shortest));
  }
};

/// How long the first and the last tile of a sequence take: measured, with what it takes to begin and end a tile.
__device__ inline void add_sequence(TimeOfTiles& time, const Problem& p, const Lengths& lengths, bool is_short) {
  if (lengths.sq == 0) return;
  const auto of_row = [&](int row) {
    const float blocks = static_cast<float>(visible_keys(p.mask, lengths, row).size()) / 128;
    return is_short ? blocks + 1 : 1.5F * blocks + 4;
  };
  time.add(is_short ? 1 : divide(lengths.sq * p.group() - 1, 128) + 1, of_row(0), of_row(lengths.sq - 1));
}

/// Says how many of `workers` multiprocessors are to serve the long sequences, so that both launches take as long. For
/// one warp.
__device__ inline void divide_workers(const Problem& p, int short_rows, int workers, bool whole_tiles,
                                      int* long_workers) {
  ptx::begin_overlapped();
  const int lane = threadIdx.x % 32;
  TimeOfTiles of_short;
  TimeOfTiles of_long;
#pragma unroll 1
  for (int b = lane; b < p.batch; b += 32) {
    const Lengths lengths = p.sequence(b).lengths;
    const bool is_short = lengths.sq <= short_rows;
    add_sequence(is_short ? of_short : of_long, p, lengths, is_short);
  }
  of_short = of_short.of_warp();
  of_long = of_long.of_warp();
  int best = of_long.tiles == 0 ? 0 : workers;
  if (of_long.tiles > 0 && of_short.tiles > 0) {
    float least = TimeOfTiles::never;
#pragma unroll 1
    for (int n = 1 + lane; n < workers; n += 32) {
      const float time =
          fmaxf(of_long.until_done(p.heads_k, n, whole_tiles), of_short.until_done(p.heads_k, workers - n, false));
      if (time < least) {
        least = time;
        best = n;
      }
    }
    const unsigned lanes = __ballot_sync(~0U, least == -warp_max(-least));
    best = __shfl_sync(~0U, best, __ffs(lanes) - 1);
  }
  if (lane == 0) *long_workers = best;
}

}  // namespace mate::cuda
