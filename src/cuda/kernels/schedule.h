// The scheduler warp of the forward kernel.
#pragma once

#include "forward_shared.h"
#include "ptx/launch.h"
#include "tile_rows.h"

namespace mate::cuda {

template <ForwardVariant variant, typename Scheduler>
__device__ void schedule(const ForwardArguments& a, ForwardShared<variant>& shared) {
  // While earlier kernels run to their end a share is found from lengths that they may yet change. Behind them it is
  // found again only where they did.
  enum class Found { rehearsed, not_yet, found };
  // Gathering kernels have no registers for what would have to be kept, and some none for rehearsing.
  constexpr bool keeps = variant.splits && !variant.gather;
  constexpr bool rehearses = variant.splits && !(variant.gather && variant.wide && variant.widens());
  Found share = rehearses && !__all_sync(~0U, shared.readable.is_complete(0)) ? Found::rehearsed : Found::not_yet;
  if (share == Found::not_yet) ptx::await_earlier_kernels();
  Scheduler scheduler(a);
  for (RingPlace<ForwardShared<variant>::work_stages> place;; place.advance()) {
    if constexpr (!variant.splits) {
      // Not more than one tile is taken ahead of its turn: others may have nothing to do by then.
      shared.begun.wait(!place.is_odd());
    }
    shared.work.empty[place.stage()].wait(place.parity() ^ 1);
    TileWork& work = shared.works[place.stage()];
    bool found = false;
    for (;;) {
      if constexpr (variant.splits) {
        if (share != Found::found) scheduler.begin();
        if (!rehearses) share = Found::found;
      }
      found = scheduler.next(work);
      __syncwarp();
      if constexpr (rehearses) {
        const bool rehearsed = share == Found::rehearsed;
        share = Found::found;
        if (rehearsed) {
          ptx::await_earlier_kernels();
          if (!keeps || !scheduler.still_holds()) {
            share = Found::not_yet;
            continue;
          }
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
    if (first_lane()) shared.work.full[place.again().stage()].arrive();
    if (!found) return;
  }
}

}  // namespace mate::cuda
