// The scheduler warp of the forward kernel.
#pragma once

#include "forward_shared.h"
#include "side_by_side.h"
#include "tile_rows.h"

namespace mate::cuda {

/// Ends the rehearsal of the first tile, which was found, or not `found`, while earlier kernels ran: waits for their
/// end, and tells the loaders whether it is the tile that they will get. Returns whether the search need not be made
/// again: lengths are what they were then, and of tiles that are not cut one was found.
template <ForwardVariant variant, typename Scheduler>
__device__ bool end_rehearsal(const Scheduler& scheduler, ForwardShared<variant>& shared, bool found,
                              const TileWork& work) {
  if (first_lane()) shared.rehearsal.rehearsed.arrive();
  ptx::await_earlier_kernels();
  const bool holds = scheduler.still_holds(work);
  const bool stays = holds && (!found || work.blocks.size() > 0);
  if (first_lane()) shared.rehearsal.holds = stays;
  if (!stays) shared.rehearsal.looked_up.wait(0);
  return holds;
}

template <ForwardVariant variant, typename Scheduler>
__device__ void schedule(const ForwardArguments& a, ForwardShared<variant>& shared, Scheduler scheduler) {
  // While earlier kernels run to their end, the share of a small batch, or a cluster's tile, is found from lengths that
  // they may yet change. Behind them it is found again, but not where it is kept and they did not change.
  enum class Found { rehearsed, not_yet, found };
  constexpr bool keeps = variant.keeps_rehearsed();
  Found share = Found::not_yet;
  if constexpr (variant.splits || keeps) {
    // Of two launches neither can: their shares follow from what a kernel before them says.
    const bool early = a.served.which == Sequences::all && scheduler.may_begin_early() &&
                       !__all_sync(~0U, shared.readable.is_complete(0));
    if constexpr (keeps) {
      if (early) share = Found::rehearsed;
      if (first_lane()) {
        shared.rehearsal.exists = early;
        if (!early) shared.rehearsal.rehearsed.arrive();
      }
      if (!early) await_inputs(a);
    } else {
      // begin() is a long program that is to be there once. The first time brings lengths into the cache.
#pragma unroll 1
      for (bool once_more = early;; once_more = false) {
        if (!once_more) await_inputs(a);
        scheduler.begin(shared.batch_steps());
        if (!once_more) break;
      }
    }
  } else {
    await_inputs(a);
  }
  for (RingPlace<ForwardShared<variant>::work_stages> place;; place.advance()) {
    if constexpr (!variant.splits) {
      // A tile is found when the one before is begun; or a step earlier, if that is shorter than finding one takes, and
      // enough are left for those who would have nothing to do by then. Those before the first count as begun.
      constexpr int few_blocks = 4;
      const auto await_begin_of = [&](RingPlace<2> tile) { shared.begun[tile.stage()].wait(tile.parity()); };
      await_begin_of(place.before(2).template in<2>());
      const bool hurries = scheduler.has_plenty() && shared.works[place.before(1).stage()].blocks.size() <= few_blocks;
      if (!hurries) await_begin_of(place.before(1).template in<2>());
    }
    shared.work.empty[place.stage()].wait(place.parity() ^ 1);
    TileWork& work = shared.works[place.stage()];
    bool found = false;
    // One loop for the first tile and all others: begin() and next() are long programs, which are to be there once.
    for (;;) {
      if constexpr (keeps) {
        if (share != Found::found) scheduler.begin(shared.batch_steps());
      }
      found = scheduler.next(work);
      __syncwarp();
      if constexpr (keeps) {
        const bool rehearsed = share == Found::rehearsed;
        share = Found::found;
        if (rehearsed && !end_rehearsal(scheduler, shared, found, work)) {
          share = Found::not_yet;
          continue;
        }
      }
      if (!found || work.blocks.size() > 0) break;
      // Consumers hold on to a tile until they find the next, so those without keys must not be in their way.
      clear_tile(a, work);
      __syncwarp();
    }
    if constexpr (variant.scaled()) {
      if (found && first_lane()) shared.scales[place.stage()] = scales_of<variant>(a, work);
    }
    if (first_lane()) {
      // None, unless a consumer will say that there is one.
      if (variant.may_merge_apart() && a.parts.cut_tiles != nullptr && place.is_first()) {
        a.parts.cut_tiles[this_worker<variant>(a).index()].parts.count = 0;
      }
      shared.work.full[place.again().stage()].arrive();
    }
    if (!found) return;
  }
}

}  // namespace mate::cuda
