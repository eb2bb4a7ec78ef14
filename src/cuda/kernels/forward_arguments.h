// What a forward kernel is launched with.
#pragma once

#include "attention/problem.h"
#include "attention/shares.h"
#include "tensor_map.h"

namespace mate::cuda {

/// A tile of which several blocks of threads have parts, as the launch that merges them has to know it.
struct CutTile {
  int sequence;
  int unit;
  int first_query;
  int used;
  int first_q;  ///< see Sequence
  int query_capacity;
  float value_factor;  ///< multiplies sums of values
  TileParts parts;     ///< count is 0 where there is no tile
};

/// Threads of a block of the kernel that merges parts.
inline constexpr int merge_threads = 128;

/// Results over parts of tiles' keys, until they are merged: `rows` rows to each slot.
struct PartialResults {
  float* sums = nullptr;     ///< (slots, rows, dv rounded up), float32
  float* weights = nullptr;  ///< (slots, rows, 2): the exponent of 2 that they are relative to, and their sum
  int rows = 0;
  int columns = 0;        ///< of sums
  int slots_of_tile = 0;  ///< where each tile has its own, since it is cut into parts of its own
  /// Where another launch merges them, of each worker (Worker::index) the tile whose first part it has, but not all.
  CutTile* cut_tiles = nullptr;
};

/// Which sequences of a call a launch serves. Where prompts are read and tokens decoded in one call, prompts need the
/// matrix units and decoding needs memory: two launches, of kernels made for either, then run side by side, each on its
/// share of the multiprocessors (side_by_side.h). With batch_invariant the same kernel so serves a sequence whatever
/// others there are.
enum class Sequences { all, prefills, decodes };

/// Threads of the kernel that partitions the multiprocessors between two launches.
inline constexpr int partition_threads = 256;

struct ServedSequences {
  Sequences which = Sequences::all;
  int decode_rows = 0;             ///< query rows that a sequence which is decoded uses at most
  int* prefill_workers = nullptr;  ///< how many blocks of threads serve prompts
};

/// The tensors for the copy engine, which wants them where the kernel is launched with them. Of no use to a gather.
struct TensorMaps {
  TensorMap q;   ///< (d, pack, rows, head units, slots), in boxes of a tile's rows
  TensorMap qv;  ///< like q, where it is given
  TensorMap k;   ///< (d, heads, rows, slots), in boxes of one chunk of `box_keys` keys; or see all_chunks_k
  TensorMap v;
};

struct ForwardArguments {
  TensorMaps maps;
  Problem problem;
  ServedSequences served;
  int pack = 1;                ///< query heads that share a tile, a unit
  int rows_of_block = 0;       ///< rows of a tile that a block of threads has: a multiple of pack
  int units = 1;               ///< of query heads,
  int units_of_key_head = 1;   ///< and how many of them share a key head
  float heads_reciprocal = 1;  ///< 1 / pack
  float score_factor =
      1;  ///< multiplies products before they are capped and compared: 1, but for softcap and odd scales
  float exponent_scale = 1;  ///< multiplies scores to make them exponents of 2; not negative
  int keys_in_l2 = 0;        ///< keys and values of one head that the L2 cache holds
  int copy_bytes = 0;        ///< rows that are read one by one are read in pieces of so many bytes
  int box_keys = 0;          ///< keys that are fetched together: no more than a page has
  int boxes = 0;             ///< of a block of keys
  // Whether a box of k, of v, has all chunks of its rows, or of those columns that are fetched together, for stream.h
  // and wide.h: (columns of a chunk, rows, chunks, heads, slots).
  bool all_chunks_k = false;
  bool all_chunks_v = false;
  bool wide_rows = false;         ///< rows of out are aligned to 16 bytes
  float* carried_sums = nullptr;  ///< room for those of each block of threads, if it is needed
  int expected_tiles = 0;         ///< about as many as there are, of all sequences; 0: unknown
  int* counters = nullptr;        ///< 0 before and after: of tiles taken, or of the parts of tiles that are done

  // Where the keys of tiles are shared out.
  Cut cut;
  int team = 1;  ///< blocks of threads that take tiles of the same keys at the same time
  PartialResults parts;
};

/// Calls visit(field, value) for each field of a call's arguments that all but few calls leave at that value.
template <typename Arguments, typename Visit>
constexpr void for_each_rare_field(Arguments& a, const Visit& visit) {
  visit(a.problem.mask.chunk, 0);
  visit(a.problem.mask.cp_world, 1);
  visit(a.problem.queries.seqused.data, nullptr);
  visit(a.problem.keys.batch_index.data, nullptr);
  visit(a.problem.keys.leftpad.data, nullptr);
  visit(a.problem.sink.data, nullptr);
  visit(a.problem.lse.data, nullptr);
  visit(a.served.which, Sequences::all);
  visit(a.wide_rows, true);
  visit(a.cut.kind, Cut::Kind::even);
}

/// Whether a call asks for nothing rare, so that ForwardVariant::plain serves it.
constexpr bool is_plain(const ForwardArguments& arguments) {
  bool plain = true;
  for_each_rare_field(arguments, [&](const auto& field, auto value) { plain = plain && field == value; });
  return plain;
}

/// The arguments of such a call, in which the compiler sees what it does not ask for.
constexpr ForwardArguments plain_arguments(ForwardArguments arguments) {
  for_each_rare_field(arguments, [](auto& field, auto value) { field = value; });
  return arguments;
}

}  // namespace mate::cuda
