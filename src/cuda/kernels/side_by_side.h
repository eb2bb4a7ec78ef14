// Two launches that run side by side, for the prompts and the decoded tokens of a call: see Sequences. That for the
// prompts comes first.
#pragma once

#include "forward_arguments.h"
#include "ptx/launch.h"
#include "warp.h"

namespace mate::cuda {

/// At the beginning of a kernel: lets the next one begin, but for the launch that serves prompts, since what that lets
/// begin reads inputs without waiting for them.
__device__ inline void let_next_begin_at_once(const ForwardArguments& a) {
  if (a.served.which != Sequences::prefills) ptx::let_next_kernel_begin();
}

/// Waits until the inputs are there. The launch that decodes need not, since it may begin only when the other has
/// waited; a fence keeps it from finding in the L1 cache what was there before. Where there is but one multiprocessor,
/// none is left for it, and it waits.
__device__ inline void await_inputs(const ForwardArguments& a) {
  if (a.served.which == Sequences::decodes && gridDim.x > 1) {
    ptx::fence_acquire();
    return;
  }
  ptx::await_earlier_kernels();
  if (a.served.which == Sequences::prefills) ptx::let_next_kernel_begin();
}

/// At the end of a kernel: what comes after two launches awaits the end of the second one, that which decodes, so that
/// it must not be before the other's.
__device__ inline void await_prefills(const ForwardArguments& a) {
  if (a.served.which == Sequences::decodes && blockIdx.x == 0) ptx::await_earlier_kernels();
}

/// Whether a sequence that uses so many query rows is this launch's.
__device__ inline bool serves(const ForwardArguments& a, int used_queries) {
  if (a.served.which == Sequences::all) return true;
  return (used_queries <= a.served.decode_rows) == (a.served.which == Sequences::decodes);
}

/// Of `workers` blocks of threads, how many have work: either grid is as large as the device, and the others end at
/// once. Never 0, since shares are divided by it.
__device__ inline int workers_of_launch(const ForwardArguments& a, int workers) {
  if (a.served.which == Sequences::all) return workers;
  const int of_prefills = __ldcg(a.served.prefill_workers);
  return clamp(a.served.which == Sequences::prefills ? of_prefills : workers - of_prefills, 1, workers);
}

/// What the tiles of a launch take, as multiples of the time in which a multiprocessor decodes `block_keys` keys.
struct TimeOfTiles {
  static constexpr int block_keys = 128;
  static constexpr int tile_rows = 128;  ///< of prompts
  static constexpr float never = 3e38F;

  float all;
  float longest;  ///< of a tile
  float shortest;
  int tiles;

  __device__ static TimeOfTiles none() { return {0, 0, never, 0}; }

  /// `count` tiles, the first and the last of which take so long.
  __device__ void add(int count, float first, float last) {
    all += static_cast<float>(count) * (first + last) / 2;
    longest = fmaxf(longest, fmaxf(first, last));
    shortest = fminf(shortest, fminf(first, last));
    tiles += count;
  }
  /// The tile of a sequence that is decoded.
  __device__ void add_decode(const Problem& p, const Lengths& lengths) {
    constexpr float ends = 1;  // what it takes to begin and end a tile
    const float time = (blocks_of_row(p, lengths, 0) + blocks_of_row(p, lengths, lengths.sq - 1)) / 2 + ends;
    add(1, time, time);
  }
  /// The tiles of a prompt: a block takes 2.0 µs where decoding one takes 1.3, while both launches run.
  __device__ void add_prefill(const Problem& p, const Lengths& lengths) {
    constexpr float block = 1.5F;
    constexpr float ends = 4;
    add(divide(lengths.sq * p.group() - 1, tile_rows) + 1, block * blocks_of_row(p, lengths, 0) + ends,
        block * blocks_of_row(p, lengths, lengths.sq - 1) + ends);
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

 private:
  /// Blocks of keys that a query row sees.
  __device__ static float blocks_of_row(const Problem& p, const Lengths& lengths, int row) {
    return static_cast<float>(visible_keys(p.mask, lengths, row).size()) / block_keys;
  }
};

/// Says how many of `workers` multiprocessors are to serve prompts, a multiple of `step`, so that the later of both
/// launches ends as soon as can be. For a block of partition_threads.
__device__ inline void partition_multiprocessors(const Problem& p, int decode_rows, int workers, int step,
                                                 bool whole_tiles, int* prefill_workers) {
  constexpr int warps = partition_threads / 32;
  __shared__ TimeOfTiles of_warps[2][warps];
  ptx::begin_overlapped();
  const int lane = threadIdx.x % 32;
  TimeOfTiles decodes = TimeOfTiles::none();
  TimeOfTiles prefills = TimeOfTiles::none();
#pragma unroll 1
  for (int b = threadIdx.x; b < p.batch; b += partition_threads) {
    const Lengths lengths = p.sequence(b).lengths;
    if (lengths.sq > decode_rows) {
      prefills.add_prefill(p, lengths);
    } else if (lengths.sq > 0) {
      decodes.add_decode(p, lengths);
    }
  }
  decodes = decodes.of_warp();
  prefills = prefills.of_warp();
  if (lane == 0) {
    of_warps[0][threadIdx.x / 32] = decodes;
    of_warps[1][threadIdx.x / 32] = prefills;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  decodes = (lane < warps ? of_warps[0][lane] : TimeOfTiles::none()).of_warp();
  prefills = (lane < warps ? of_warps[1][lane] : TimeOfTiles::none()).of_warp();
  // Where nothing is decoded, a block of the other launch still waits on a multiprocessor of its own.
  int best = prefills.tiles == 0 ? 0 : p.sm_margin > 0 ? workers - 1 : workers;
  if (prefills.tiles > 0 && decodes.tiles > 0) {
    float least = TimeOfTiles::never;
#pragma unroll 1
    for (int n = step * (1 + lane); n < workers; n += step * 32) {
      const float time =
          fmaxf(prefills.until_done(p.heads_k, n, whole_tiles), decodes.until_done(p.heads_k, workers - n, false));
      if (time < least) {
        least = time;
        best = n;
      }
    }
    const unsigned lanes = __ballot_sync(~0U, least == -warp_max(-least));
    best = __shfl_sync(~0U, best, __ffs(lanes) - 1);
  }
  if (lane == 0) *prefill_workers = best;
}

}  // namespace mate::cuda
