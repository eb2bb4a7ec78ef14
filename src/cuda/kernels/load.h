// From rows in global memory to swizzled tiles in shared memory: by tensor maps, or row by row.
//
// A tile is chunks of columns, each a block of rows of 128 bytes whose eight pieces of 16 bytes are permuted: piece c
// of row r stands at place c ^ (r % 8). Products read it without bank conflicts. Blocks of keys and values for stream.h
// are boxes one after another, each laid out as such a tile: see RowsOfWarp.
#pragma once

#include "element.h"
#include "forward_arguments.h"
#include "forward_variant.h"
#include "ptx/cp_async.h"
#include "ptx/tma.h"

namespace mate::cuda {

/// One thread has the copy engine fetch a tile of `rows` rows, chunk by chunk.
template <int rows, int element_bytes, typename... Coordinates>
__device__ inline void load_tile(unsigned char* tile, int head_dim, const TensorMap& map, ptx::Mbarrier& barrier,
                                 Coordinates... coordinates) {
#pragma unroll
  for (int chunk = 0; chunk < chunks_of(head_dim, element_bytes); ++chunk) {
    ptx::load_box(tile + chunk * rows * chunk_row_bytes, map, barrier, chunk * (chunk_row_bytes / element_bytes),
                  coordinates...);
  }
}

/// One thread has it fetch a box of keys or values, with a policy for the L2 cache, for as many blocks of threads as a
/// cluster has.
template <int cluster_blocks, typename... Coordinates>
__device__ inline void load_keys_box(unsigned char* target, const TensorMap& map, ptx::Mbarrier& barrier,
                                     ptx::CachePolicy policy, Coordinates... coordinates) {
  if constexpr (cluster_blocks > 1) {
    constexpr unsigned short all_blocks = (1 << cluster_blocks) - 1;
    ptx::load_box_for_cluster(target, map, barrier, policy, all_blocks, coordinates...);
  } else {
    ptx::load_box(target, map, barrier, policy, coordinates...);
  }
}

/// The same of some columns, chunk by chunk, which are `chunk_bytes` apart.
template <int element_bytes, int cluster_blocks>
__device__ inline void load_keys(unsigned char* tile, int chunk_bytes, int first_column, int columns,
                                 const TensorMap& map, ptx::Mbarrier& barrier, ptx::CachePolicy policy, int head,
                                 int row, int slot) {
#pragma unroll
  for (int chunk = 0; chunk < chunks_of(columns, element_bytes); ++chunk) {
    const int column = first_column + chunk * (chunk_row_bytes / element_bytes);
    load_keys_box<cluster_blocks>(tile + chunk * chunk_bytes, map, barrier, policy, column, head, row, slot);
  }
}

/// Pieces of 16 bytes of a row of a tile.
constexpr int pieces_of(int head_dim, int element_bytes) { return chunks_of(head_dim, element_bytes) * 8; }

/// Where piece `piece` of 16 bytes of a row stands in a tile of `rows` rows.
template <int rows>
__device__ inline unsigned piece_offset(unsigned row, unsigned piece) {
  return (piece / 8 * rows + row) * chunk_row_bytes + ((piece % 8) ^ (row % 8)) * 16;
}

/// The same of a byte.
template <int rows>
__device__ inline unsigned byte_offset(unsigned row, unsigned byte) {
  return piece_offset<rows>(row, byte / 16) + byte % 16;
}

/// A warp clears rows begin .. end of a tile, whose rows have so many pieces; offset_of(row, piece) is where one is.
template <typename OffsetOf>
__device__ inline void clear_rows(unsigned char* tile, int pieces, int begin, int end, const OffsetOf& offset_of) {
  // This is rare: what follows from the lane had better not be kept in registers all along.
  const int lane = ptx::known_only_here(threadIdx.x % 32);
#pragma unroll 1
  for (int i = begin * pieces + lane; i < end * pieces; i += 32) {
    *reinterpret_cast<uint4*>(tile + offset_of(i / pieces, i % pieces)) = make_uint4(0, 0, 0, 0);
  }
}

/// Values that no row of the sequence sees must not meet weights of 0, since they may be NaN: a warp clears them in
/// `count` rows of a tile, those of the keys from `first_key` on.
template <typename OffsetOf>
__device__ inline void clear_unseen(unsigned char* tile, int pieces, KeyRange seen, int first_key, int count,
                                    const OffsetOf& offset_of) {
  clear_rows(tile, pieces, 0, clamp(seen.begin - first_key, 0, count), offset_of);
  clear_rows(tile, pieces, clamp(seen.end - first_key, 0, count), count, offset_of);
}

/// What a pointer to constants points to.
template <typename Pointer>
struct Pointee;
template <typename Element>
struct Pointee<const Element*> {
  using Type = Element;
};

/// Fetches tiles row by row, by `warps` warps together, whatever the alignment of rows. Nobody waits for the copies but
/// who waits for the tile's barrier, at which they arrive().
template <int warps>
class GatherLoader {
  /// A warp takes groups of rows in turns.
  static constexpr int group = 8;
  /// Smaller pieces are written as others are.
  static constexpr int smallest_async = 4;

 public:
  /// Rows are copied in pieces of `copy_bytes`.
  __device__ GatherLoader(unsigned thread, int copy_bytes)
      : warp_(thread / 32), lane_(thread % 32), copy_bytes_(copy_bytes) {}

  /// Arrives at the barrier when what this thread has copied before is there.
  __device__ void arrive(ptx::Mbarrier& full) const {
    if (copy_bytes_ >= smallest_async) {
      ptx::arrive_after_copies(full);
    } else {
      full.arrive();
    }
  }

  /// Rows of a tile of so many that each warp takes, at most, and which row of the tile the i-th of them is.
  template <int rows>
  static constexpr int rows_of_warp = (rows + warps * group - 1) / (warps * group) * group;
  __device__ unsigned row_of_warp(unsigned i) const { return (i / group * warps + warp_) * group + i % group; }

  /// row_of(r, i) is where row r of the tile begins, the i-th of this warp, or null for a row of zeros: all lanes of a
  /// warp ask at once. It points to integers of an element's size. Elements past `head_dim` become zeros, up to
  /// `padded`.
  template <int rows, int padded, typename RowOf>
  __device__ void copy(unsigned char* tile, int head_dim, const RowOf& row_of) const {
    switch (copy_bytes_) {
      case 16:
        copy_pieces<rows, padded, 16>(tile, head_dim, row_of);
        break;
      case 8:
        copy_pieces<rows, padded, 8>(tile, head_dim, row_of);
        break;
      default:
        copy_words<rows, padded>(tile, head_dim, row_of);
    }
  }

 private:
  /// The lanes of a warp share a row, or several where rows are short; a few copies are made without a loop, so that
  /// the address of one is found while others are.
  template <int rows, int padded, int bytes, typename RowOf>
  __device__ void copy_pieces(unsigned char* tile, int head_dim, const RowOf& row_of) const {
    using Element = typename Pointee<decltype(row_of(0, 0))>::Type;
    constexpr int elements = bytes / sizeof(Element);
    constexpr int pieces = padded / elements;
    constexpr int rows_at_once = pieces <= 4 ? group : pieces <= 8 ? 4 : pieces <= 16 ? 2 : 1;
    constexpr int copies_of_row = pieces < 32 ? 1 : pieces / 32;
    constexpr int rows_unrolled = copies_of_row < 4 ? 4 / copies_of_row : 1;
    // What follows from it would otherwise be kept in registers from tile to tile, for each size of copies.
    const unsigned lane = ptx::known_only_here(lane_);
    constexpr unsigned lanes_of_row = 32 / rows_at_once;
    const unsigned row_of_lane = lane / lanes_of_row;
#pragma unroll 1
    for (int i = 0; row_of_warp(i) < rows; i += group) {
      unsigned char* const rows_of_group = tile + row_of_warp(i) * chunk_row_bytes;
#pragma unroll(rows_unrolled)
      for (int step = 0; step < group; step += rows_at_once) {
        const unsigned row_of_group = step + row_of_lane;
        const Element* source = row_of(row_of_warp(i) + row_of_group, i + row_of_group);
#pragma unroll
        for (int first = 0; first < pieces; first += lanes_of_row) {
          const unsigned column = (first + lane % lanes_of_row) * elements;
          if (column >= padded) break;
          // A group begins where the pattern of a swizzled tile does, so that its rows are alike in all groups.
          unsigned char* const target = rows_of_group + byte_offset<rows>(row_of_group, column * sizeof(Element));
          const bool inside = source != nullptr && column < head_dim;
          ptx::copy_async<bytes>(ptx::shared_address(target), source + column, inside);
        }
      }
    }
  }

  /// Four bytes at a time, in one piece or, where rows are aligned to fewer, element by element. Such rows are rare, so
  /// that little code counts for more than time.
  template <int rows, int padded, typename RowOf>
  __device__ void copy_words(unsigned char* tile, int head_dim, const RowOf& row_of) const {
    using Element = typename Pointee<decltype(row_of(0, 0))>::Type;
    constexpr int elements = 4 / sizeof(Element);
    const unsigned lane = ptx::known_only_here(lane_);
#pragma unroll 1
    for (int i = 0; row_of_warp(i) < rows; ++i) {
      const unsigned row = row_of_warp(i);
      const Element* source = row_of(row, i);
#pragma unroll
      for (int first = 0; first < padded; first += 32 * elements) {
        const unsigned column = first + elements * lane;
        if (column >= padded) break;
        unsigned char* const target = tile + byte_offset<rows>(row, column * sizeof(Element));
        const bool inside = source != nullptr && column < head_dim;
        if (copy_bytes_ == smallest_async) {
          ptx::copy_async<smallest_async>(ptx::shared_address(target), source + column, inside);
        } else {
          unsigned word = 0;
#pragma unroll
          for (int j = 0; j < elements; ++j) {
            const bool exists = inside && column + j < head_dim;
            word |= (exists ? source[column + j] : 0U) << j * 8 * sizeof(Element);
          }
          *reinterpret_cast<unsigned*>(target) = word;
        }
      }
    }
  }

  unsigned warp_;
  unsigned lane_;
  int copy_bytes_;
};

}  // namespace mate::cuda
