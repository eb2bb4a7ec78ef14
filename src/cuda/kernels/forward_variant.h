// What is fixed when a forward kernel is compiled. Shared by the host, which chooses it, and device code.
#pragma once

#include "attention/problem.h"
#include "attention/tiling.h"

namespace mate::cuda {

/// Columns of a chunk: tiles in shared memory are chunks of rows of 128 bytes, as the copy engine swizzles them.
inline constexpr int chunk_columns = 64;
inline constexpr int chunk_row_bytes = 128;

/// Shared memory beside the tiles: barriers, what the scheduler says of a tile, and what its rows see.
inline constexpr int other_shared_bytes = 3072;

constexpr int chunks_of(int head_dim) { return (head_dim + chunk_columns - 1) / chunk_columns; }

/// What is done to a product of a query and a key before it is compared with others.
enum class Scores {
  products,  ///< nothing
  scaled,    ///< it is multiplied: where the call's scale is not positive
  capped     ///< it is multiplied, and the hyperbolic tangent taken
};

struct ForwardVariant {
  ElementType element = ElementType::bfloat16;
  int head_dim = 0;    ///< of the keys, rounded up to a multiple of 16 (wide: 64)
  int head_dim_v = 0;  ///< of the values, likewise (wide: 128)
  int warpgroups = 0;  ///< consumers, each with 64 rows of the tile (wide: with half of the columns of the same rows)
  int block_keys = 0;  ///< keys of a block
  int stages = 0;      ///< blocks of keys, and of values, in shared memory
  int q_stages = 0;    ///< tiles of queries in shared memory
  Scores scores = Scores::products;
  bool gather = false;  ///< rows are loaded one by one, whatever their alignment; else by tensor maps
  bool splits = false;  ///< the keys of a tile are shared out among blocks of threads
  bool wide = false;    ///< the kernel of wide.h, else that of forward.h
  bool qv = false;      ///< scores are of values too (wide)

  /// Whether all query rows of a unit of heads, in any sequence, are one tile: decoding.
  constexpr bool one_tile() const { return !wide && warpgroups == 1; }
  /// Parts of a tile, of 64 rows each, that consumers are done with at times of their own.
  constexpr int row_groups() const { return wide ? 1 : warpgroups; }
  /// Consumers of the same rows.
  constexpr int consumers_of_row() const { return warpgroups / row_groups(); }
  /// Columns of values that a consumer sums up.
  constexpr int consumer_columns() const { return head_dim_v / consumers_of_row(); }
  /// Rows that there is room for. A tile holds whole queries, of `pack` rows each.
  constexpr int tile_rows() const { return 64 * row_groups(); }
  constexpr Tiling tiling(int pack) const { return {tile_rows() / pack * pack, block_keys, pack}; }
  /// Of the scheduler and the loaders. Where rows are gathered for one consumer, which may wait for nothing but memory,
  /// copying takes more threads.
  constexpr int producer_warpgroups() const { return gather && warpgroups == 1 ? 2 : 1; }
  /// Rows are gathered by all producers but the scheduler.
  constexpr int loader_warps() const { return gather ? 4 * producer_warpgroups() - 1 : 2; }
  constexpr int threads() const { return 128 * (warpgroups + producer_warpgroups()); }
  /// Of a row of q and, behind it, qv.
  constexpr int q_chunks() const { return chunks_of(head_dim) + (qv ? chunks_of(head_dim_v) : 0); }
  constexpr int q_bytes() const { return tile_rows() * q_chunks() * chunk_row_bytes; }
  constexpr int k_bytes() const { return block_keys * chunks_of(head_dim) * chunk_row_bytes; }
  constexpr int v_bytes() const { return block_keys * chunks_of(head_dim_v) * chunk_row_bytes; }
  /// Of weights, where consumers have them in common.
  constexpr int p_bytes() const { return wide ? tile_rows() * chunks_of(block_keys) * chunk_row_bytes : 0; }
  constexpr int shared_bytes() const {
    return q_stages * q_bytes() + stages * (k_bytes() + v_bytes()) + p_bytes() + other_shared_bytes;
  }
  // Registers of a thread. A block starts with as many for all its threads; what the producers give up the consumers
  // take. With one consumer there are enough for all.
  constexpr bool moves_registers() const { return threads() > 256; }
  constexpr int registers_at_start() const { return moves_registers() ? 64 * 1024 / threads() / 8 * 8 : 248; }
  constexpr int producer_registers() const { return warpgroups == 3 ? 32 : gather || splits ? 88 : 40; }
  constexpr int consumer_registers() const {
    if (!moves_registers()) return registers_at_start();
    const int all = registers_at_start() * threads() / 128 - producer_registers() * producer_warpgroups();
    return all / warpgroups < 248 ? all / warpgroups / 8 * 8 : 248;
  }
};

}  // namespace mate::cuda
