// What is fixed when a forward kernel is compiled. Shared by the host, which chooses it, and device code.
#pragma once

#include "attention/problem.h"
#include "attention/tiling.h"

namespace mate::cuda {

/// Tiles in shared memory are chunks of rows of 128 bytes, as the copy engine swizzles them.
inline constexpr int chunk_row_bytes = 128;
/// Columns of a chunk of elements of 16 bits.
inline constexpr int chunk_columns = chunk_row_bytes / 2;

/// Shared memory of a block of threads.
inline constexpr int most_shared_bytes = 227 * 1024;

/// Blocks of a cluster that any GPU allows.
inline constexpr int largest_cluster = 8;

constexpr int chunks_of(int head_dim, int element_bytes = 2) {
  return (head_dim * element_bytes + chunk_row_bytes - 1) / chunk_row_bytes;
}

/// What is done to a product of a query and a key before it is compared with others.
enum class Scores {
  products,  ///< nothing
  scaled,    ///< it is multiplied: where the call's scale is not positive
  capped     ///< it is multiplied, and the hyperbolic tangent taken
};

/// What a call's tensors hold.
struct TensorTypes {
  ElementType query = ElementType::bfloat16;  ///< of q and qv
  ElementType key = ElementType::bfloat16;    ///< of k and v
  ElementType out = ElementType::bfloat16;

  constexpr bool all_e4m3() const { return query == ElementType::float8_e4m3 && key == ElementType::float8_e4m3; }
  /// What e4m3 is widened to, without loss, and what is multiplied then.
  constexpr ElementType widened() const { return query == ElementType::float8_e4m3 ? ElementType::float16 : query; }
};

struct ForwardVariant {
  TensorTypes types;
  int head_dim = 0;    ///< of the keys, rounded up to a multiple of 16 (wide, stream: 64, e4m3: 32)
  int head_dim_v = 0;  ///< of the values, likewise (above 256: 64, wide: 128, transposed: 256 or 512, stream: 64, of
                       ///< e4m3 128)
  int warpgroups = 0;  ///< consumers, each with 64 rows of the tile (wide: with half of the columns of the same rows;
                       ///< transposed: scorers and adders)
  int block_keys = 0;  ///< keys of a block
  int stages = 0;      ///< blocks of keys, and of values, in shared memory
  int fetched_stages = 0;  ///< likewise of e4m3, before they are prepared
  int q_stages = 0;        ///< tiles of queries in shared memory
  Scores scores = Scores::products;
  bool gather = false;      ///< rows are loaded one by one, whatever their alignment; else by tensor maps
  bool splits = false;      ///< the keys of a tile are shared out among blocks of threads
  bool wide = false;        ///< the kernel of wide.h, or that of transposed.h
  int stream_rows = 0;      ///< rows of a tile of the kernel of stream.h; 0: another kernel
  int transposed_rows = 0;  ///< rows of a tile of the kernel of transposed.h, 16, 32 or 64; 0: another kernel
  bool qv = false;          ///< scores are of values too (wide)
  bool e4m3 = false;        ///< e4m3 is multiplied as it is, values transposed, by weights of e4m3; else it is widened
  int cluster_blocks = 1;  ///< blocks of threads that have a tile together: each has rows of its own or, where keys are
                           ///< shared out, heads, and fetches a part of the keys and values for all of them
  bool merges_in_cluster = false;  ///< each tile is a cluster's, of any size, whose blocks of threads share out its
                                   ///< keys and merge what they have summed up, in each other's shared memory
  bool plain = false;  ///< without what few calls ask for (for_each_rare_field in forward_arguments.h): code that is
                       ///< not executed still stands between what is, and a GPU waits for code as for memory

  constexpr bool stream() const { return stream_rows > 0; }
  constexpr bool transposed() const { return transposed_rows > 0; }
  /// Whether products are transposed: keys, and columns of values, are rows of their first operands, which threads take
  /// into registers, and query rows are the columns.
  constexpr bool keys_are_rows() const { return stream() || transposed(); }
  /// Whether the query rows that any served sequence uses, of a unit of heads, are one tile: decoding. Rows of out past
  /// it are cleared.
  constexpr bool one_tile() const { return stream() || (!wide && warpgroups == 1); }
  /// Whether another launch may merge parts of tiles: few rows are merged as soon as all of them are there.
  constexpr bool may_merge_apart() const { return splits && !stream(); }
  /// Whether consumers score the next block while they multiply the values of this one (forward.h).
  constexpr bool scores_ahead() const { return !wide && !stream(); }
  /// Whether blocks of threads reach into each other's shared memory.
  constexpr bool clustered() const { return cluster_blocks > 1 || merges_in_cluster; }
  /// Parts of a tile, of 64 rows each, that consumers are done with at times of their own.
  constexpr int row_groups() const { return wide || stream() ? 1 : warpgroups; }
  /// Consumers of the same rows.
  constexpr int consumers_of_row() const { return transposed() ? adders() : warpgroups / row_groups(); }
  // Consumers of transposed.h: those that make weights, and those that add weighted values. Sums of few rows leave
  // registers for two of the former.
  constexpr int adders() const { return 2; }
  constexpr int scorers() const { return warpgroups - adders(); }
  /// Slices of a block of values that are fetched and done with at times of their own: the columns of each consumer,
  /// where the copy engine brings them to it.
  constexpr int v_slices() const { return wide && !gather ? consumers_of_row() : 1; }
  /// Columns of values that a consumer sums up.
  constexpr int consumer_columns() const { return stream() ? head_dim_v : head_dim_v / consumers_of_row(); }
  /// Rows that a block of threads has room for. It has whole queries, of `pack` rows each.
  constexpr int tile_rows() const {
    return stream() ? stream_rows : transposed() ? transposed_rows : 64 * row_groups();
  }
  constexpr Tiling tiling(int pack) const { return {tile_rows() / pack * pack * row_blocks(), block_keys, pack}; }
  // Blocks of a cluster that have other rows of the same heads, and other units of heads that share a key head.
  constexpr int row_blocks() const { return splits ? 1 : cluster_blocks; }
  constexpr int unit_blocks() const { return splits ? cluster_blocks : 1; }
  /// Blocks of a cluster that each fetch some boxes of a block of keys, or of values. Those of wide.h take turns: one
  /// fetches all of a block of keys, and a slice of a block of values.
  constexpr int box_blocks() const { return wide ? 1 : cluster_blocks; }
  /// What is multiplied.
  constexpr ElementType element() const {
    return e4m3 ? ElementType::float8_e4m3 : keys_are_rows() && scaled() ? ElementType::float16 : types.widened();
  }
  /// Keys and values are e4m3: tensors that come with scales.
  constexpr bool scaled() const { return types.key == ElementType::float8_e4m3; }
  /// Queries of bfloat16 that meet keys of e4m3 where these become float16 do so too.
  constexpr bool fits_queries() const { return keys_are_rows() && scaled() && types.query == ElementType::bfloat16; }
  /// Keys and values are e4m3, which is widened in shared memory.
  constexpr bool widens() const { return scaled() && !keys_are_rows() && !e4m3; }
  /// The same of queries.
  constexpr bool widens_queries() const { return types.query == ElementType::float8_e4m3 && !stream() && !e4m3; }
  /// Sums of products of e4m3 are set aside as often: see carried_sums.h. In shared memory, if they fit there.
  constexpr int blocks_between_carries() const { return (carries_in_shared() ? 1024 : 2048) / block_keys; }
  constexpr bool carries_in_shared() const { return head_dim_v <= 128; }
  /// Of a block of threads.
  constexpr int carried_sums() const { return e4m3 ? tile_rows() * head_dim_v : 0; }
  constexpr int carried_shared_bytes() const {
    return carries_in_shared() ? carried_sums() * static_cast<int>(sizeof(float)) : 0;
  }
  /// Values, at least, are not multiplied as they are fetched.
  constexpr bool prepares() const { return widens() || e4m3; }
  /// Blocks of threads whose consumers have done with a buffer of values before it is filled again: each block of a
  /// cluster prepares its own.
  constexpr int cluster_of_values() const { return prepares() ? 1 : cluster_blocks; }
  /// Whether memory alone is what consumers wait for, as a single one may, and those of few rows do: there are more
  /// producers then.
  constexpr bool awaits_memory() const { return warpgroups == 1 || stream(); }
  /// Of the scheduler, the loaders and the preparers.
  constexpr int producer_warpgroups() const {
    if (widens()) return awaits_memory() ? 3 : head_dim <= 128 && head_dim_v <= 128 ? 2 : 1;
    return gather && awaits_memory() ? 2 : 1;
  }
  /// They are the last warps of the producers.
  constexpr int preparer_warps() const {
    if (!prepares()) return 0;
    return producer_warpgroups() > 1 ? 4 * (producer_warpgroups() - 1) : gather ? 1 : 2;
  }
  /// Rows are gathered by all producers but the scheduler and the preparers.
  constexpr int loader_warps() const {
    const int rest = 4 * producer_warpgroups() - 1 - preparer_warps();
    return gather || rest < 2 ? rest : 2;
  }
  /// A share that is found ahead of time is kept: gathering kernels have no registers for that.
  constexpr bool keeps_rehearsed() const { return (splits || merges_in_cluster) && !gather; }
  constexpr int threads() const { return 128 * (warpgroups + producer_warpgroups()); }
  // Bytes of an element in tiles that consumers take.
  constexpr int query_bytes() const { return bytes_of(stream() ? types.query : element()); }
  constexpr int key_bytes() const { return bytes_of(keys_are_rows() ? types.key : element()); }
  /// Of a row of q and, behind it, qv.
  constexpr int q_chunks() const {
    return chunks_of(head_dim, query_bytes()) + (qv ? chunks_of(head_dim_v, query_bytes()) : 0);
  }
  constexpr int q_bytes() const { return tile_rows() * q_chunks() * chunk_row_bytes; }
  /// Where qv stands behind q.
  constexpr int qv_offset() const { return tile_rows() * chunks_of(head_dim, query_bytes()) * chunk_row_bytes; }
  constexpr int k_bytes() const { return block_keys * chunks_of(head_dim, key_bytes()) * chunk_row_bytes; }
  constexpr int v_bytes() const {
    return e4m3 ? head_dim_v * chunks_of(block_keys, key_bytes()) * chunk_row_bytes
                : block_keys * chunks_of(head_dim_v, key_bytes()) * chunk_row_bytes;
  }
  /// Of blocks before they are prepared.
  constexpr int fetched_k_bytes() const { return widens() ? block_keys * chunks_of(head_dim, 1) * chunk_row_bytes : 0; }
  constexpr int fetched_v_bytes() const {
    return prepares() ? block_keys * chunks_of(head_dim_v, 1) * chunk_row_bytes : 0;
  }
  // What a block of a cluster has summed up, where blocks of keys and values were before. Rows begin in different
  // banks.
  constexpr int part_pitch() const { return head_dim_v + 8; }
  constexpr int part_bytes() const { return tile_rows() * (part_pitch() + 2) * static_cast<int>(sizeof(float)); }
  constexpr bool has_room_for_part() const {
    return part_bytes() <= stages * (k_bytes() + v_bytes()) + fetched_bytes();
  }
  constexpr int fetched_bytes() const { return fetched_stages * (fetched_k_bytes() + fetched_v_bytes()); }
  /// Tiles of weights, where consumers have them in common: one that they use in turns, or a ring.
  constexpr int p_tiles() const { return !transposed() ? 1 : transposed_rows <= 32 ? 4 : 2; }
  constexpr int p_tile_bytes() const { return tile_rows() * chunks_of(block_keys) * chunk_row_bytes; }
  constexpr int p_bytes() const { return wide ? p_tiles() * p_tile_bytes() : 0; }
  /// Warps that each have keys of a block, and sums, of their own.
  constexpr int stream_warps() const { return 4 * warpgroups; }
  /// Of a row of a warp's sums in shared memory: rows begin in different banks.
  constexpr int sums_pitch() const { return head_dim_v + 4; }
  constexpr int warp_sums_bytes() const {
    return stream() ? stream_warps() * tile_rows() * sums_pitch() * static_cast<int>(sizeof(float)) : 0;
  }
  /// Beside the tiles: barriers, what the scheduler says of a tile, and what its rows see.
  constexpr int other_shared_bytes() const {
    return transposed() ? 10240 : (e4m3 && warpgroups == 3) || (wide && stages > 2) ? 4096 : 3072;
  }
  constexpr int tile_bytes() const { return most_shared_bytes - other_shared_bytes(); }
  constexpr int shared_bytes() const {
    return q_stages * q_bytes() + stages * (k_bytes() + v_bytes()) + fetched_bytes() + p_bytes() + warp_sums_bytes() +
           carried_shared_bytes() + other_shared_bytes();
  }
  // Registers of a thread. A block starts with as many for all its threads; what the producers give up the consumers
  // take. With one consumer there are enough for all.
  constexpr bool moves_registers() const { return threads() > 256; }
  constexpr int registers_at_start() const { return moves_registers() ? 64 * 1024 / threads() / 8 * 8 : 248; }
  constexpr int producer_registers() const {
    if (scores_ahead() && warpgroups == 3) return e4m3 ? 56 : 32;
    if (e4m3) return splits ? 88 : gather ? 72 : 56;
    // Consumers of wide.h have registers to spare: they score 64 keys, or 128 where sums are few.
    if (wide && !gather && (splits || !transposed())) return 72;
    if ((transposed() || (stream() && warpgroups > 1)) && gather) return 80;
    return gather || splits || (widens() && producer_warpgroups() == 1) ? 88 : 40;
  }
  /// Of warpgroups of producers beside the first.
  constexpr int other_producer_registers() const {
    return !widens() ? producer_registers() : awaits_memory() ? 80 : 56;
  }
  constexpr int scorer_registers() const {
    return scorers() == 2 ? (gather ? 80 : 88) : transposed_rows == 64 ? 104 : 136;
  }
  constexpr int consumer_registers() const {
    if (!moves_registers()) return registers_at_start();
    if (transposed()) {
      const int rest = registers_at_start() * threads() / 128 - producer_registers() - scorers() * scorer_registers();
      return rest / adders() / 8 * 8;
    }
    const int all = registers_at_start() * threads() / 128 - producer_registers() -
                    other_producer_registers() * (producer_warpgroups() - 1);
    return all / warpgroups < 248 ? all / warpgroups / 8 * 8 : 248;
  }
};

}  // namespace mate::cuda
