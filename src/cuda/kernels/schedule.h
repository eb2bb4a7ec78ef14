// The scheduler warp of the forward kernel.
#pragma once

#include "forward_shared.h"
#include "ptx/launch.h"
#include "tile_rows.h"

namespace mate::cuda {

template <ForwardVariant variant, typename Scheduler>
__device__ void schedule(const ForwardArguments& a, ForwardShared<variant>& shared) {
  // While earlier kernels run to their end a share is found from lengths that they may yet change, and found again
  // behind them: then the code and the arguments are in the caches when it counts.
  bool rehearses = variant.splits && !__all_sync(~0U, shared.readable.is_complete(0));
  if (!rehearses) ptx::await_earlier_kernels();
  for (;;) {
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
        found = scheduler.next(work);
        __syncwarp();
        if (rehearses || !found || work.blocks.size() > 0) break;
        // Consumers hold on to a tile until they find the next, so those without keys must not be in their way.
        clear_tile(a, work);
        __syncwarp();
      }
      if (rehearses) break;
      if constexpr (variant.scaled()) {
        if (found && first_lane()) shared.scales[place.stage()] = scales_of<variant>(a, work);
      }
      if (first_lane()) shared.work.full[place.again().stage()].arrive();
      if (!found) return;
    }
    ptx::await_earlier_kernels();
    rehearses = false;
  }
}

}  // namespace mate::cuda
