// Chooses, prepares and launches the prefill kernel of a call.
#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <numeric>
#include <set>
#include <span>

#include "attention/check.h"
#include "backend.h"
#include "counters.h"
#include "device.h"
#include "kernel_library.h"
#include "kernels/prefill_arguments.h"
#include "kernels/prefill_variant.h"
#include "tensor_map.h"

namespace mate::cuda {
namespace {

constexpr int largest_head_dim = 256;
constexpr int element_bytes = 2;
/// Shared memory that tiles may take of the 227 KiB of a block.
constexpr int tile_bytes = 227 * 1024 - other_shared_bytes;
constexpr int widest_block_keys = 176;

constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

/// What a block of keys follows from, beside head sizes and type.
struct BlockChoice {
  bool narrow = false;  ///< as wide as a tile is high: one of them lies on the diagonal, and few keys fill it
  bool alike = false;   ///< the same however rows are loaded
};

BlockChoice choose_blocks(const Problem& p) {
  constexpr int few_keys = 1024;
  const bool diagonal = p.mask.right >= 0 || p.mask.chunk > 0;
  const bool few = std::min(p.max_seqlen_k, p.keys.rows) <= few_keys;
  // What a row's sums are made of must not depend on the rest of the batch, nor on where it lies, where that is asked
  // for.
  return {.narrow = diagonal || (few && !p.batch_invariant), .alike = p.batch_invariant};
}

/// The most keys of a block that registers and shared memory hold.
int most_block_keys(const PrefillVariant& variant, bool narrow) {
  const bool capped = variant.scores == Scores::capped;
  // A thread keeps sums, scores and weights, and needs some registers besides, more where scores are capped.
  int other_registers = variant.warpgroups == 3 ? 32 : 36;
  if (capped) other_registers += variant.gather ? 32 : 20;
  const int registers = variant.consumer_registers() - other_registers - variant.head_dim_v / 2;
  const int row_bytes = (chunks_of(variant.head_dim) + chunks_of(variant.head_dim_v)) * chunk_row_bytes;
  const int by_registers = registers * 4 / 3;
  const int by_memory = (tile_bytes - variant.q_bytes()) / (variant.stages * row_bytes);
  const int most = capped && variant.warpgroups == 3    ? 96
                   : capped || narrow || variant.gather ? 128
                                                        : widest_block_keys;
  return std::min({by_registers, by_memory, most}) / 16 * 16;
}

/// The largest tiles that registers and shared memory hold.
PrefillVariant choose_variant(int head_dim, int head_dim_v, ElementType type, Scores scores, BlockChoice blocks,
                              bool gather) {
  const auto largest = [&](bool gathers) {
    PrefillVariant variant;
    variant.element = type;
    variant.head_dim = round_up(head_dim, 16);
    variant.head_dim_v = round_up(head_dim_v, 16);
    variant.scores = scores;
    variant.gather = gathers;
    variant.warpgroups = std::max(variant.head_dim, variant.head_dim_v) <= 64 && !gathers ? 3 : 2;
    variant.stages = 2;
    variant.block_keys = most_block_keys(variant, blocks.narrow);
    return variant;
  };
  PrefillVariant variant = largest(gather);
  if (blocks.alike) variant.block_keys = std::min(variant.block_keys, largest(!gather).block_keys);
  const int bytes = variant.stages * (variant.k_bytes() + variant.v_bytes());
  variant.q_stages = bytes + 2 * variant.q_bytes() <= tile_bytes ? 2 : 1;
  return variant;
}

/// What tells variants apart, in a number.
std::uint64_t key_of(const PrefillVariant& v) {
  std::uint64_t key = 0;
  const auto append = [&](int value, int bits) { key = key << bits | static_cast<std::uint64_t>(value); };
  append(static_cast<int>(v.element), 2);
  append(v.head_dim, 10);
  append(v.head_dim_v, 10);
  append(v.warpgroups, 3);
  append(v.block_keys, 9);
  append(v.stages, 3);
  append(v.q_stages, 3);
  append(static_cast<int>(v.scores), 2);
  append(v.gather, 1);
  return key;
}

const char* name_of(ElementType type) { return type == ElementType::float16 ? "float16" : "bfloat16"; }

const char* name_of(Scores scores) {
  switch (scores) {
    case Scores::products:
      return "products";
    case Scores::scaled:
      return "scaled";
    case Scores::capped:
      return "capped";
  }
  return "";
}

KernelSource source_of(const PrefillVariant& v) {
  const auto flag = [](bool value) { return value ? "true" : "false"; };
  KernelSource source;
  source.name =
      join("prefill_", name_of(v.element), "_d", v.head_dim, "_v", v.head_dim_v, "_rows", v.tile_rows(), "_keys",
           v.block_keys, v.scores == Scores::products ? "" : join("_", name_of(v.scores)), v.gather ? "_gather" : "");
  source.text =
      join("#include \"prefill.h\"\n\nextern \"C\" __global__ void __launch_bounds__(", v.threads(), ", 1)\n",
           source.name, "(const __grid_constant__ mate::cuda::PrefillArguments arguments) {\n",
           "  constexpr mate::cuda::PrefillVariant variant{\n",
           "      .element = mate::ElementType::", name_of(v.element), ",\n", "      .head_dim = ", v.head_dim, ",\n",
           "      .head_dim_v = ", v.head_dim_v, ",\n", "      .warpgroups = ", v.warpgroups, ",\n",
           "      .block_keys = ", v.block_keys, ",\n", "      .stages = ", v.stages, ",\n",
           "      .q_stages = ", v.q_stages, ",\n", "      .scores = mate::cuda::Scores::", name_of(v.scores), ",\n",
           "      .gather = ", flag(v.gather), "};\n", "  mate::cuda::prefill<variant>(arguments);\n}\n");
  source.shared_bytes = v.shared_bytes();
  return source;
}

/// The powers of two, up to 16, that divide all addresses of rows.
class Alignment {
 public:
  void add(const Rows& rows, long long slots, long long row_count, long long heads) {
    add(reinterpret_cast<std::uintptr_t>(rows.data));
    if (slots > 1) add(rows.slot_stride * element_bytes);
    if (row_count > 1) add(rows.row_stride * element_bytes);
    if (heads > 1) add(rows.head_stride * element_bytes);
  }
  void add(long long bytes) { bytes_ = std::gcd(bytes_, bytes); }
  int bytes() const { return static_cast<int>(bytes_); }

 private:
  long long bytes_ = 16;
};

/// A dimension of a tensor for the copy engine. Where there is one entry the stride is of no account.
struct Dimension {
  long long extent;
  long long stride;  ///< in elements
  int box;

  std::uint64_t bytes() const { return extent > 1 ? static_cast<std::uint64_t>(stride) * element_bytes : 16; }
};

bool encode(TensorMap& map, const void* data, int head_dim, std::span<const Dimension> rest) {
  constexpr std::size_t most_dimensions = 5;
  std::array<std::uint64_t, most_dimensions> extents{static_cast<std::uint64_t>(head_dim)};
  std::array<std::uint64_t, most_dimensions> strides{};
  std::array<std::uint32_t, most_dimensions> box{chunk_columns};
  std::size_t rank = 1;
  for (const Dimension& dimension : rest) {
    extents[rank] = static_cast<std::uint64_t>(dimension.extent);
    strides[rank - 1] = dimension.bytes();
    box[rank] = static_cast<std::uint32_t>(dimension.box);
    ++rank;
  }
  return encode_tensor_map(map, element_bytes, data, std::span(extents).first(rank), std::span(strides).first(rank - 1),
                           std::span(box).first(rank));
}

/// Describes the tensors to the copy engine. False where it cannot read one of them.
bool encode_maps(const Problem& p, const PrefillVariant& variant, PrefillArguments& arguments) {
  const int pack = arguments.pack;
  const Dimension q[] = {{pack, p.q.head_stride, pack},
                         {p.queries.rows, p.q.row_stride, variant.tile_rows() / pack},
                         {p.heads_q / pack, p.q.head_stride * pack, 1},
                         {p.query_slots(), p.q.slot_stride, 1}};
  if (!encode(arguments.q, p.q.data, p.head_dim, q)) return false;
  if (p.keys.rows == 0 || p.keys.slots == 0) return true;  // nothing will be read
  const auto encode_keys = [&](TensorMap& map, const Rows& rows, int head_dim) {
    const Dimension dimensions[] = {{p.heads_k, rows.head_stride, 1},
                                    {p.keys.rows, rows.row_stride, variant.block_keys},
                                    {p.keys.slots, rows.slot_stride, 1}};
    return encode(map, rows.data, head_dim, dimensions);
  };
  return encode_keys(arguments.k, p.k, p.head_dim) && encode_keys(arguments.v, p.v, p.head_dim_v);
}

Scores scores_of(const Problem& p) {
  if (p.softcap > 0) return Scores::capped;
  return p.softmax_scale > 0 ? Scores::products : Scores::scaled;
}

void set_scales(const Problem& p, PrefillArguments& arguments) {
  constexpr float log2_of_e = 1.4426950408889634F;
  const auto finite = [](float x) { return std::clamp(x, -FLT_MAX, FLT_MAX); };
  if (p.softcap > 0) {
    arguments.score_factor = finite(p.softmax_scale / p.softcap);
    arguments.exponent_scale = finite(p.softcap * log2_of_e);
  } else if (p.softmax_scale == 0) {
    arguments.score_factor = 0;
    arguments.exponent_scale = 1;
  } else {
    // The largest score is then the largest product.
    arguments.score_factor = p.softmax_scale < 0 ? -1 : 1;
    arguments.exponent_scale = finite(std::abs(p.softmax_scale) * log2_of_e);
  }
}

/// Query heads that share a tile: those of a group, where that makes fewer tiles.
int choose_pack(const Problem& p, const PrefillVariant& variant) {
  const int group = p.group();
  if (p.pack_gqa == 0 || group <= 1) return 1;
  if (!variant.gather && variant.tile_rows() % group != 0) return 1;
  if (std::int64_t{p.queries.rows} * group > max_length) return 1;
  const int rows = p.ragged_queries() ? std::min(p.max_seqlen_q, p.queries.rows) : p.queries.rows;
  const std::int64_t apart = std::int64_t{group} * tiles_of(variant.tiling(1), rows);
  return p.pack_gqa == 1 || tiles_of(variant.tiling(group), rows) < apart ? group : 1;
}

/// At least as many tiles as there are: only the device knows the lengths of ragged sequences.
std::int64_t most_tiles(const Problem& p, const PrefillVariant& variant, int pack) {
  const Tiling tiling = variant.tiling(pack);
  const std::int64_t tiles = p.ragged_queries() ? std::int64_t{tiles_of(tiling, p.queries.rows)} + p.batch
                                                : std::int64_t{tiles_of(tiling, p.queries.rows)} * p.batch;
  return tiles * (p.heads_q / pack);
}

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  fail(ErrorKind::not_implemented, "on an NVIDIA GPU MATE does not serve ", parts..., " yet");
}

void require_head_sizes(int head_dim, int head_dim_v) {
  if (std::max(head_dim, head_dim_v) > largest_head_dim) {
    refuse("head sizes above ", largest_head_dim, " (q and k have ", head_dim, ", v has ", head_dim_v, ")");
  }
}

KernelFamily& prefill_kernels() {
  static KernelFamily kernels;
  return kernels;
}

}  // namespace

void require_served(const Problem& p, int device_id) {
  const Device& gpu = device(device_id);
  if (gpu.capability != 90) {
    refuse("compute capability ", gpu.capability / 10, ".", gpu.capability % 10, " (", gpu.name,
           "), only Hopper's 9.0,");
  }
  for (const ElementType type : {p.q.type, p.k.type}) {
    if (type == ElementType::float32) fail(ErrorKind::not_implemented, "float32 is served on the CPU only");
    if (type == ElementType::float8_e4m3) refuse("float8_e4m3fn");
  }
  if (p.qv.given()) refuse("qv");
  require_head_sizes(p.head_dim, p.head_dim_v);
  if (p.keys.paged()) refuse("paged keys (page_table)");
  if (p.keys.appends) refuse("appending to a cache");
}

void forward(const Problem& p, int device_id, void* stream) {
  if (p.batch == 0 && !p.ragged_queries()) return;
  if (p.queries.rows == 0 || p.heads_q == 0) return;
  const Device& gpu = device(device_id);
  const CurrentContext context(gpu);

  PrefillArguments arguments;
  arguments.problem = p;
  Alignment inputs;
  inputs.add(p.q, p.query_slots(), p.queries.rows, p.heads_q);
  inputs.add(p.k, p.keys.slots, p.keys.rows, p.heads_k);
  inputs.add(p.v, p.keys.slots, p.keys.rows, p.heads_k);
  const auto choose = [&](bool gather) {
    return choose_variant(p.head_dim, p.head_dim_v, p.q.type, scores_of(p), choose_blocks(p), gather);
  };
  PrefillVariant variant = choose(inputs.bytes() < 16);
  arguments.pack = choose_pack(p, variant);
  if (!variant.gather && !encode_maps(p, variant, arguments)) {
    variant = choose(true);
    arguments.pack = choose_pack(p, variant);
  }
  inputs.add(p.head_dim * element_bytes);
  inputs.add(p.head_dim_v * element_bytes);
  arguments.copy_bytes = inputs.bytes();
  Alignment results;
  results.add(p.out, p.query_slots(), p.queries.rows, p.heads_q);
  results.add(p.head_dim_v * element_bytes);
  arguments.wide_rows = results.bytes() == 16;
  arguments.heads_reciprocal = 1.0F / static_cast<float>(arguments.pack);
  set_scales(p, arguments);
  arguments.keys_in_l2 = gpu.l2_bytes / 2 / ((p.head_dim + p.head_dim_v) * element_bytes);

  const std::int64_t tiles = most_tiles(p, variant, arguments.pack);
  require(tiles < max_length - gpu.multiprocessors, "q must have fewer than 2**31 tiles of ", variant.tile_rows(),
          " rows, got ", tiles);
  const int multiprocessors = std::max(1, gpu.multiprocessors - p.sm_margin);
  const Kernel kernel = prefill_kernels().load(gpu, key_of(variant), [&] { return source_of(variant); });
  const auto queue = static_cast<CUstream>(stream);
  arguments.tiles_taken = counters(queue);
  const Launch shape{.grid = {static_cast<unsigned>(std::clamp<std::int64_t>(tiles, 1, multiprocessors))},
                     .block = {static_cast<unsigned>(variant.threads())},
                     .stream = queue};
  launch(kernel, shape, arguments);
}

std::vector<KernelSource> kernels_for(int head_dim, int head_dim_v, ElementType type, bool softcap) {
  require_head_sizes(head_dim, head_dim_v);
  std::vector<KernelSource> sources;
  const Scores scores = softcap ? Scores::capped : Scores::products;
  std::set<std::string> names;
  for (const bool gather : {false, true}) {
    for (const BlockChoice blocks : {BlockChoice{.narrow = true}, BlockChoice{}, BlockChoice{.alike = true},
                                     BlockChoice{.narrow = true, .alike = true}}) {
      const KernelSource source = source_of(choose_variant(head_dim, head_dim_v, type, scores, blocks, gather));
      if (names.insert(source.name).second) sources.push_back(source);
    }
  }
  return sources;
}

}  // namespace mate::cuda
