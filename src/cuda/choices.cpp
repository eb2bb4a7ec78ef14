#include "choices.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <numbers>
#include <numeric>

#include "attention/check.h"

namespace mate::cuda {
namespace {

// Of most kernels, for estimates.
constexpr int typical_tile_rows = 128;
constexpr int typical_block_keys = 128;
/// Rows of a tile that one warpgroup multiplies.
constexpr int consumer_rows = 64;

Scores scores_of(const Problem& p) {
  if (p.softcap > 0) return Scores::capped;
  return p.softmax_scale > 0 ? Scores::products : Scores::scaled;
}

/// Query rows of a sequence, on average, as far as the host knows.
int mean_rows(const Problem& p) {
  return p.ragged_queries() && p.batch > 0
             ? std::min(static_cast<int>(divide_up(p.queries.rows, p.batch)), most_rows(p))
             : most_rows(p);
}

/// Keys of the longest sequence, as far as the host knows.
int most_keys(const Problem& p) { return std::min(key_capacity(p), p.max_seqlen_k); }

/// Whether sequences may use different numbers of query rows, which only the device knows.
bool rows_differ(const Problem& p) { return p.ragged_queries() || p.queries.seqused.given(); }

/// Whether all sequences use as many query rows, unless what the host knows of them is wrong.
bool has_uniform_rows(const Problem& p) {
  return !p.queries.seqused.given() && (!p.ragged_queries() || std::int64_t{most_rows(p)} * p.batch == p.queries.rows);
}

/// Blocks of keys that the tiles of a sequence take, for each of its heads, if `pack` of them share a tile; in the time
/// of a multiprocessor, whose cluster takes them together.
float blocks_of_sequence(const Problem& p, const ForwardVariant& variant, int pack, int rows) {
  const Tiling tiling = variant.tiling(pack);
  const int keys = most_keys(p);
  const Lengths lengths{rows, keys, keys};
  const int tiles = tiles_of(tiling, rows);
  if (tiles == 0) return 0;
  const auto blocks_of = [&](int tile) { return blocks_of_tile(tiling, p.mask, lengths, tile).size(); };
  const float blocks = static_cast<float>(blocks_of(0) + blocks_of(tiles - 1)) / 2;
  // A sequence's last tile is half full on average, where sequences have rows of their own.
  const float begun = static_cast<float>(tiles) + (p.batch > 1 && rows_differ(p) ? 0.5F : 0.0F);
  return begun * blocks * static_cast<float>(variant.row_blocks()) / static_cast<float>(pack);
}

/// Blocks of keys that the tiles of a sequence take, of those that a launch serves, packed as choose_pack() says.
float blocks_of_sequence(const Problem& p, const ForwardVariant& variant, Sequences which) {
  return blocks_of_sequence(p, variant, choose_pack(p, variant),
                            which == Sequences::prefills ? most_rows(p) : mean_rows(p));
}

/// Query heads that may share a tile.
int most_pack(const Problem& p) { return p.pack_gqa == 0 ? 1 : p.group(); }

/// Packed rows of the longest sequence, where all heads of a group are packed: those that are cleared, too.
std::int64_t most_packed_rows(const Problem& p) {
  const int rows = p.ragged_queries() ? p.max_seqlen_q : p.queries.rows;
  return std::int64_t{rows} * most_pack(p);
}

/// Whether all packed rows of any sequence fit one consumer: decoding, mostly.
bool has_few_rows(const Problem& p) { return most_packed_rows(p) <= consumer_rows; }

/// Whether a batch-invariant call may cut a sequence. How many rows ragged and padded ones have only the device knows.
bool may_cut(const Problem& p, int block_keys) {
  if (rows_differ(p)) return true;
  const int keys = key_capacity(p);
  return !AlignedCut({p.queries.rows, keys, keys}, {p.group(), p.heads_k, p.head_dim, p.head_dim_v, block_keys})
              .leaves_whole();
}

/// Whether all sequences are as long, as far as the host knows.
bool are_alike(const Problem& p) {
  const KeyLayout& keys = p.keys;
  return p.batch == 1 || !(rows_differ(p) || keys.cu_seqlens.given() || keys.seqused.given() || keys.leftpad.given());
}

/// Whether some sequences have far more query rows than others: some are read, others decoded.
bool is_mixed(const Problem& p) { return std::int64_t{2} * mean_rows(p) < most_rows(p); }

/// Blocks of keys of the longest sequence that are worth being shared out, whatever it costs to merge the parts.
constexpr int long_blocks = 10;

bool has_long_keys(const Problem& p) { return divide_up(most_keys(p), typical_block_keys) > long_blocks; }

/// From so many parts of a tile on, one multiprocessor takes longer to merge them than another launch, in which each
/// row is merged by a warp of its own.
constexpr int many_parts = 8;

/// Whether tiles are cut into so many parts if keys are shared out evenly.
bool has_many_parts(const Problem& p, const ForwardVariant& variant, int workers) {
  const std::int64_t tiles = std::max<std::int64_t>(most_tiles(p, variant, choose_pack(p, variant)), 1);
  const std::int64_t parts = workers / tiles + 1;  // one of each worker that has some of a tile's keys
  return std::min<std::int64_t>(parts, divide_up(most_keys(p), variant.block_keys)) >= many_parts;
}

/// How the keys of tiles are shared out among blocks of threads.
enum class Sharing {
  none,
  even,       ///< all blocks of threads have as much to do
  in_cluster  ///< those of each tile among a cluster
};

/// How keys of many rows are shared out in the least time: not at all, if blocks of threads take whole tiles, those of
/// a sequence with the most keys first; evenly; or in clusters of so many blocks.
Sharing choose_sharing(const Problem& p, int multiprocessors, int cluster) {
  // Merging takes as long as so many blocks of keys.
  constexpr float merging = 8.5;
  constexpr float merging_in_cluster = 3.5;
  constexpr float worth = 1.2F;      // a block that is shared out evenly takes so much longer; and keys may be fewer
  constexpr float tiles_enough = 8;  // of each multiprocessor, whatever their keys are
  const Tiling tiling{typical_tile_rows, typical_block_keys, p.group()};
  const int rows = mean_rows(p);
  const int keys = most_keys(p);
  if (rows == 0 || p.batch == 0) return Sharing::none;
  const Lengths lengths{rows, keys, clamp(std::int64_t{keys} * p.mask.cp_world, 0, max_length)};
  const int tiles_of_unit = tiles_of(tiling, rows);
  const float tiles = static_cast<float>(tiles_of_unit) * static_cast<float>(p.batch) * static_cast<float>(p.heads_k) /
                      static_cast<float>(multiprocessors);
  const auto blocks_of = [&](int tile) {
    return static_cast<float>(blocks_of_tile(tiling, p.mask, lengths, tile).size());
  };
  const auto [least, most] = std::minmax({blocks_of(0), blocks_of(tiles_of_unit - 1)});
  const float shared = tiles * (most + least) / 2;
  const auto even = [&](float blocks) { return worth * blocks + merging; };
  const bool alike = are_alike(p);
  if (cluster > 1) {
    // Of sequences that may differ all but one are half as long as the longest, on average.
    const float expected = alike ? 1 : (1 + 1 / static_cast<float>(p.batch)) / 2;
    const float in_cluster = most / static_cast<float>(cluster) + merging_in_cluster;
    if (in_cluster < std::min(most, even(expected * shared))) return Sharing::in_cluster;
  }
  // Where they may not be alike, one tile of the longest may come last.
  if (!alike) return most > long_blocks && tiles < tiles_enough ? Sharing::even : Sharing::none;
  const float whole = std::max(most, std::min(std::ceil(tiles) * most, shared + least));
  return whole > even(shared) ? Sharing::even : Sharing::none;
}

/// How a call's keys are shared out: as it says, or so that it takes the least time.
Sharing sharing_of(const Problem& p, const VariantChoice& choice, int multiprocessors) {
  const bool few_rows = has_few_rows(p);
  if (p.num_splits != 0) return few_rows || p.num_splits > 1 ? Sharing::even : Sharing::none;
  // Prompts need the matrix units, decoded tokens memory: even shares of both, at the same time, take less time than
  // one after the other.
  if (is_mixed(p) && !few_rows) return has_long_keys(p) ? Sharing::even : Sharing::none;
  VariantChoice merged = choice;
  merged.merges_in_cluster = true;
  const int cluster = cluster_of_tile(p, choose_variant(merged), multiprocessors);
  if (!few_rows) return choose_sharing(p, multiprocessors, cluster);
  // Memory is the limit, however many keys there are. Of several sequences one may have most of them.
  return p.batch == 1 && cluster > 1 ? Sharing::in_cluster : Sharing::even;
}

/// Whether exponents of e4m3, with descales that do not enlarge them, may be so large that float32 rounds them to more
/// than a half: weights of e4m3 would then saturate.
bool has_large_scores(const Problem& p) {
  constexpr float largest_product = 448.0F * 448.0F;
  constexpr float largest_exact = 0x1p23F;
  const float largest_score = p.softcap > 0 ? 1 : largest_product * static_cast<float>(p.head_dim);
  return scales_of(p).exponent * largest_score > largest_exact;
}

/// Whether prompts and decoded tokens of one call are served by two launches since that takes less time.
bool gains_by_two_launches(const Problem& p, int multiprocessors) {
  constexpr int least_blocks = 64;  // of keys, for each multiprocessor: two launches begin later than one
  if (p.num_splits != 0 || p.queries.seqused.given() || p.keys.cu_seqlens.given()) return false;
  return is_mixed(p) && has_long_keys(p) && !has_few_rows(p) && multiprocessors > 1 &&
         divide_up(most_keys(p), typical_block_keys) * p.batch * p.heads_k >=
             std::int64_t{least_blocks} * multiprocessors;
}

/// Whether prompts beside what is decoded are served tile by tile, head after head, so that the L2 cache holds their
/// keys whatever is decoded meanwhile: where there are tiles enough to keep about half of the multiprocessors busy.
bool takes_whole_tiles(const Problem& p, int multiprocessors) {
  constexpr float tiles_enough = 0.75F;  // of each multiprocessor

  const std::int64_t packed_rows = (std::int64_t{p.queries.rows} - p.batch) * p.group();  // each may decode one
  const std::int64_t tiles = divide_up(packed_rows, typical_tile_rows) * p.heads_k;
  return static_cast<float>(tiles) >= tiles_enough * static_cast<float>(multiprocessors);
}

/// Whether prompts of small heads take less time by tiles of two consumers' rows than by tiles of three's: these are
/// faster, but their last rows may be none of a sequence, and those before see more keys than they need.
bool gains_by_low_tiles(const Problem& p, VariantChoice choice, Sequences which) {
  constexpr float worth = 1.13F;  // how much longer two consumers take for a row and a key
  if (!has_small_heads(choice)) return false;
  const ForwardVariant high = choose_variant(choice);
  choice.low_tiles = true;
  const ForwardVariant low = choose_variant(choice);
  if (low.warpgroups == high.warpgroups) return false;
  const auto pairs = [&](const ForwardVariant& variant) {
    return blocks_of_sequence(p, variant, which) * static_cast<float>(variant.tile_rows() * variant.block_keys);
  };
  return worth * pairs(low) < pairs(high);
}

/// Whether a call takes less time if blocks of threads have tiles together, in clusters, and fetch keys for each other:
/// where there is a unit of the same keys' heads for each; or where tiles that are so much higher take hardly more
/// blocks of keys, whose boxes are no smaller for it than half a block. Under a mask it takes larger heads to gain by
/// it.
bool gains_by_clusters(const Problem& p, VariantChoice choice, int multiprocessors, Sequences which) {
  constexpr float most = 1.02F;
  constexpr int least_head_dim_of_masked = 128;
  if (p.mask.bounded() && std::max(p.head_dim, p.head_dim_v) < least_head_dim_of_masked) return false;
  choice.clusters = true;
  const ForwardVariant clustered = choose_variant(choice);
  const int size = clustered.cluster_blocks;
  if (size == 1 || multiprocessors < size) return false;
  if (clustered.unit_blocks() > 1) return p.group() / choose_pack(p, clustered) % size == 0;
  ForwardVariant other = clustered;
  other.cluster_blocks = 1;
  if (choose_box(p.keys, clustered) < std::min(choose_box(p.keys, other), other.block_keys / size)) return false;
  const float blocks = blocks_of_sequence(p, clustered, which);
  const float blocks_otherwise = blocks_of_sequence(p, other, which);
  // Multiprocessors that are too few for another cluster have nothing to do.
  const float used = static_cast<float>(multiprocessors / size * size) / static_cast<float>(multiprocessors);
  return blocks <= most * used * blocks_otherwise;
}

}  // namespace

ScoreScales scales_of(const Problem& p) {
  constexpr float log2_of_e = std::numbers::log2e_v<float>;
  const auto finite = [](float x) { return std::clamp(x, -FLT_MAX, FLT_MAX); };
  if (p.softcap > 0) return {finite(p.softmax_scale / p.softcap), finite(p.softcap * log2_of_e)};
  if (p.softmax_scale == 0) return {0, 1};
  // The largest score is then the largest product.
  return {p.softmax_scale < 0 ? -1.0F : 1.0F, finite(std::abs(p.softmax_scale) * log2_of_e)};
}

int most_rows(const Problem& p) {
  return p.ragged_queries() ? p.max_seqlen_q : std::min(p.max_seqlen_q, p.queries.rows);
}

int key_capacity(const Problem& p) { return p.keys.paged() ? p.keys.table_capacity : p.keys.rows; }

int choose_pack(const Problem& p, const ForwardVariant& variant) {
  const int group = p.group();
  if (p.pack_gqa == 0 || group <= 1) return 1;
  if (std::int64_t{most_rows(p)} * group > max_length) return 1;
  int pack = std::min(group, variant.tile_rows());
  while (group % pack != 0) --pack;
  const auto saves_tiles = [&](int rows) {
    return tiles_of(variant.tiling(pack), rows) < std::int64_t{pack} * tiles_of(variant.tiling(1), rows);
  };
  if (p.pack_gqa == 1 || saves_tiles(most_rows(p)) || saves_tiles(mean_rows(p))) return pack;
  // A cluster's tile, which is twice as high, has no more queries than another kernel's if heads share it.
  constexpr float worth = 0.99F;
  const int heads = variant.row_blocks();
  const bool saves_blocks =
      heads > 1 && group % heads == 0 &&
      blocks_of_sequence(p, variant, heads, mean_rows(p)) < worth * blocks_of_sequence(p, variant, 1, mean_rows(p));
  return saves_blocks ? heads : 1;
}

std::int64_t most_tiles(const Problem& p, const ForwardVariant& variant, int pack) {
  const Tiling tiling = variant.tiling(pack);
  return mate::most_tiles(tiling, variant.one_tile(), p.ragged_queries(), p.queries.rows, p.batch) * (p.heads_q / pack);
}

bool merges_apart(const Problem& p, const ForwardVariant& variant, Sequences which, int workers) {
  if (!variant.may_merge_apart() || which != Sequences::all || p.batch_invariant || p.sm_margin > 0) return false;
  if (p.num_splits == 0) return has_many_parts(p, variant, workers);
  return std::min<std::int64_t>(p.num_splits, divide_up(most_keys(p), variant.block_keys)) >= many_parts;
}

int choose_box(const KeyLayout& keys, const ForwardVariant& variant) {
  const int most = variant.block_keys / variant.box_blocks();
  if (!keys.paged()) return most;
  const int rows = std::gcd(keys.rows, most);
  return rows % 8 == 0 && !keys.leftpad.given() ? rows : 0;
}

int cluster_of_tile(const Problem& p, const ForwardVariant& variant, int multiprocessors) {
  if (!variant.merges_in_cluster || choose_box(p.keys, variant) == 0) return 1;
  const int pack = choose_pack(p, variant);
  // Sequences that are said to have as many rows are believed, unless multiprocessors are to be left free whatever they
  // have.
  const bool uniform = has_uniform_rows(p) && p.sm_margin == 0;
  const std::int64_t tiles =
      uniform && !variant.one_tile()
          ? std::int64_t{tiles_of(variant.tiling(pack), most_rows(p))} * p.batch * (p.heads_q / pack)
          : most_tiles(p, variant, pack);
  const auto fits = [&](int size) {
    // Clusters of more than two have to lie in one of the parts of a GPU, some of whose multiprocessors are then left
    // over. How many differs from one GPU to the next: bits are not to.
    const int usable = size == 2 ? multiprocessors : multiprocessors / 4 * 3;
    return tiles * size <= usable;
  };
  int size = largest_cluster;
  while (size > 1 && !fits(size)) --size;
  // Even shares of few rows would keep all multiprocessors busy: clusters have to use nearly half of them.
  const bool uses_enough = tiles * size * 9 >= std::int64_t{multiprocessors} * 4;
  return !has_few_rows(p) || uses_enough ? size : 1;
}

int choose_team(const Problem& p, const ForwardVariant& variant, int pack, int workers) {
  constexpr int largest = 8;
  const int rows = most_rows(p);
  const bool alike = has_uniform_rows(p) && p.mask.chunk == 0;
  if (variant.one_tile() || !alike || rows > variant.block_keys) return 1;
  const int tiles = tiles_of(variant.tiling(pack), rows);
  int team = std::max(1, std::min({tiles, largest, workers}));
  while (tiles % team != 0) --team;
  return team;
}

Cut choose_cut(const Problem& p) {
  if (p.batch_invariant) return {Cut::Kind::aligned};
  if (p.num_splits > 0) return {Cut::Kind::counted, p.num_splits};
  return {Cut::Kind::even};
}

int most_decode_rows(const Problem& p, int multiprocessors) {
  const TensorTypes types{p.q.type, p.k.type, p.out.type};
  if (p.qv.given() || (types.all_e4m3() && has_large_scores(p))) return 0;
  if (!p.batch_invariant) {
    if (!gains_by_two_launches(p, multiprocessors)) return 0;
    // As many as the smallest tile holds: of more rows, products would be twice as many for all.
    return stream_rows_for(types, p.head_dim, p.head_dim_v, most_pack(p)) / most_pack(p);
  }
  const int most = most_stream_rows(types, p.head_dim, p.head_dim_v);
  const bool all_few = most_packed_rows(p) <= most;
  return all_few || !rows_differ(p) ? 0 : most / most_pack(p);
}

VariantChoice choose_kernel(const Problem& p, int multiprocessors, const ServedSequences& served, bool gather) {
  constexpr int few_keys = 1024;
  VariantChoice choice{p.head_dim, p.head_dim_v, {p.q.type, p.k.type, p.out.type}, scores_of(p), gather};
  const bool large_scores = choice.types.all_e4m3() && has_large_scores(p);
  const bool decodes = served.which == Sequences::decodes;
  choice.few_rows = decodes || has_few_rows(p);
  // Kernels that are alike widen e4m3.
  choice.alike = p.batch_invariant || large_scores;
  // Where scores are large, few rows are served by forward.h too, widened.
  if (choice.few_rows && !large_scores) {
    const std::int64_t rows = decodes ? std::int64_t{served.decode_rows} * most_pack(p) : most_packed_rows(p);
    choice.stream_rows = stream_rows_for(choice.types, p.head_dim, p.head_dim_v, rows);
  }
  choice.transposed_rows = transposed_rows_for(most_packed_rows(p));
  const bool diagonal = p.mask.right >= 0 || p.mask.chunk > 0;
  choice.narrow = diagonal || most_keys(p) <= few_keys;
  choice.qv = p.qv.given();
  if (choice.stream_rows > 0) {
    choice.splits = true;
  } else if (p.batch_invariant) {
    choice.splits = may_cut(p, choose_variant(choice).block_keys);
  } else if (served.which == Sequences::prefills) {
    choice.splits = !takes_whole_tiles(p, multiprocessors);
  } else {
    const Sharing sharing = sharing_of(p, choice, multiprocessors);
    choice.splits = sharing == Sharing::even;
    choice.merges_in_cluster = sharing == Sharing::in_cluster;
  }
  choice.low_tiles = gains_by_low_tiles(p, choice, served.which);
  choice.clusters = gains_by_clusters(p, choice, multiprocessors, served.which);
  return choice;
}

}  // namespace mate::cuda
