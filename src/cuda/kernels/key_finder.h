// Where the keys of blocks are: in which slots and rows of the tensors.
//
// Numbers of pages are loaded before they are needed, and not touched until then: even to copy one to another register
// is to wait for it.
#pragma once

#include "load.h"
#include "tile_work.h"

namespace mate::cuda {

/// Where a key of paged rows is.
struct KeyPlace {
  int slot;
  int row;
};

__device__ inline KeyPlace place_of_key(const KeyLayout& keys, const Sequence& sequence, int key) {
  const Location at = locate_in_pages(keys, sequence, static_cast<unsigned>(sequence.first_k) + key);
  return {static_cast<int>(at.slot), static_cast<int>(at.row)};
}

/// Keys of a block, or the first of those that lie side by side. What no row sees is nowhere: slot -1. Neither it nor
/// what is in a page that there is not is fetched: zeros are.
template <int count>
struct KeyPlaces {
  static constexpr int size = count;
  int slot[count];
  int row[count];
};

/// Used by all lanes of a warp together, which takes the blocks of a tile from the last one on.
template <ForwardVariant variant, bool gather = variant.gather>
class KeyFinder;

/// By boxes of the copy engine: one for a block, where keys are not paged. Else each lane looks up another one: a
/// window is as many blocks as have no more boxes than a warp has lanes, and is looked up a window ahead.
template <ForwardVariant variant>
class KeyFinder<variant, false> {
 public:
  using Places = KeyPlaces<1>;

  /// What is looked up: the places of the boxes of this window and of the one before, and which of the window's blocks
  /// is the next one.
  struct Ahead {
    KeyPlace box;
    KeyPlace box_before;
    int block;
  };

  template <typename Gather>
  __device__ KeyFinder(const ForwardArguments& arguments, const Gather&)
      : a_(arguments), window_blocks_(divide(32, arguments.boxes)) {}

  __device__ Ahead look_up_last(const TileWork& work) const {
    const int last = work.blocks.end - 1;
    const int window = divide(last, window_blocks_);
    return {look_up(work, window), look_up(work, window - 1), last - window * window_blocks_};
  }

  /// The places of block n, the next one of the tile.
  __device__ Places take(const TileWork& work, int n, Ahead& ahead) const {
    if (!a_.problem.keys.paged()) return {{work.place.cache_row}, {work.place.first_k + n * variant.block_keys}};
    const int source = ahead.block * a_.boxes + static_cast<int>(threadIdx.x % 32);
    const Places places{{__shfl_sync(~0U, ahead.box.slot, source)}, {__shfl_sync(~0U, ahead.box.row, source)}};
    if (--ahead.block < 0) {
      ahead = {ahead.box_before, look_up(work, divide(n, window_blocks_) - 2), window_blocks_ - 1};
    }
    return places;
  }

 private:
  __device__ KeyPlace look_up(const TileWork& work, int window) const {
    const KeyLayout& keys = a_.problem.keys;
    const int lane = ptx::known_only_here(threadIdx.x % 32);
    const int block = divide(lane, a_.boxes);
    const int n = window * window_blocks_ + block;
    if (!keys.paged() || block >= window_blocks_ || n < work.blocks.begin) return {-1, 0};
    const int key = n * variant.block_keys + (lane - block * a_.boxes) * a_.box_keys;
    if (key >= work.seen.end || key + a_.box_keys <= work.seen.begin) return {-1, 0};
    return place_of_key(keys, work.place, key);
  }

  const ForwardArguments& a_;
  int window_blocks_;
};

/// By single rows, those that the warp gathers: where keys are not paged, of the block's first. They are looked up two
/// blocks ahead.
template <ForwardVariant variant>
class KeyFinder<variant, true> {
 public:
  using Gather = GatherLoader<variant.loader_warps()>;
  using Places = KeyPlaces<divide_up(Gather::template rows_of_warp<variant.block_keys>, 32)>;

  struct Ahead {
    Places places;
    Places places_before;
  };

  __device__ KeyFinder(const ForwardArguments& arguments, const Gather& gather) : a_(arguments), gather_(gather) {}

  __device__ Ahead look_up_last(const TileWork& work) const {
    return {look_up(work, work.blocks.end - 1), look_up(work, work.blocks.end - 2)};
  }

  __device__ Places take(const TileWork& work, int n, Ahead& ahead) const {
    const Places places = ahead.places;
    ahead = {ahead.places_before, look_up(work, n - 2)};
    return places;
  }

 private:
  __device__ Places look_up(const TileWork& work, int n) const {
    const KeyLayout& keys = a_.problem.keys;
    const int first_key = n * variant.block_keys;
    Places places;
#pragma unroll
    for (int i = 0; i < Places::size; ++i) {
      places.slot[i] = keys.paged() ? -1 : work.place.cache_row;
      places.row[i] = keys.paged() ? 0 : work.place.first_k + first_key;
      if (!keys.paged() || n < work.blocks.begin) continue;
      const int row = static_cast<int>(gather_.row_of_warp(threadIdx.x % 32 + 32 * i));
      const int key = first_key + row;
      if (row >= variant.block_keys || key >= work.seen.end || key < work.seen.begin) continue;
      const KeyPlace place = place_of_key(keys, work.place, key);
      places.slot[i] = place.slot;
      places.row[i] = place.row;
    }
    return places;
  }

  const ForwardArguments& a_;
  Gather gather_;
};

}  // namespace mate::cuda
