// Prepares and launches the forward kernels of a call.
#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <span>

#include "append.h"
#include "attention/check.h"
#include "backend.h"
#include "choices.h"
#include "counters.h"
#include "device.h"
#include "kernel_library.h"
#include "kernels/forward_arguments.h"
#include "scratch.h"
#include "tensor_map.h"
#include "variants.h"

namespace mate::cuda {
namespace {

/// The powers of two, up to 16, that divide all addresses of rows.
class Alignment {
 public:
  void add(const Rows& rows, long long slots, long long row_count, long long heads) {
    add(reinterpret_cast<std::uintptr_t>(rows.data));
    const int element_bytes = bytes_of(rows.type);
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

  std::uint64_t stride_bytes(int element_bytes) const {
    return extent > 1 ? static_cast<std::uint64_t>(stride) * static_cast<std::uint64_t>(element_bytes) : 16;
  }
};

bool encode(TensorMap& map, const Rows& rows, int columns, std::span<const Dimension> rest,
            CUtensorMapL2promotion promotion) {
  constexpr std::size_t most_dimensions = 5;
  std::array<std::uint64_t, most_dimensions> extents{static_cast<std::uint64_t>(columns)};
  std::array<std::uint64_t, most_dimensions> strides{};
  const int element_bytes = bytes_of(rows.type);
  std::array<std::uint32_t, most_dimensions> box{static_cast<std::uint32_t>(chunk_row_bytes / element_bytes)};
  std::size_t rank = 1;
  for (const Dimension& dimension : rest) {
    extents[rank] = static_cast<std::uint64_t>(dimension.extent);
    strides[rank - 1] = dimension.stride_bytes(element_bytes);
    box[rank] = static_cast<std::uint32_t>(dimension.box);
    ++rank;
  }
  return encode_tensor_map(map, element_bytes, rows.data, std::span(extents).first(rank),
                           std::span(strides).first(rank - 1), std::span(box).first(rank), promotion);
}

/// Describes the tensors to the copy engine. False where it cannot read one of them.
bool encode_maps(const Problem& p, const ForwardVariant& variant, ForwardArguments& arguments) {
  TensorMaps& maps = arguments.maps;
  const int pack = arguments.pack;
  // Reading 256 bytes where 128 are asked for saves tiles of prompts a few percent. Decoding took 2 to 7 % longer by it
  // over bfloat16, and up to 38 % over e4m3 of 128 columns, whose neighbours are other heads'.
  const CUtensorMapL2promotion promotion =
      variant.one_tile() || variant.wide ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  const auto encode_queries = [&](TensorMap& map, const Rows& rows, int head_dim) {
    const Dimension dimensions[] = {{pack, rows.head_stride, pack},
                                    {p.queries.rows, rows.row_stride, arguments.rows_of_block / pack},
                                    {p.heads_q / pack, rows.head_stride * pack, 1},
                                    {p.query_slots(), rows.slot_stride, 1}};
    return encode(map, rows, head_dim, dimensions, promotion);
  };
  if (!variant.widens_queries()) {  // else they fetch them
    if (!encode_queries(maps.q, p.q, p.head_dim)) return false;
    if (p.qv.given() && !encode_queries(maps.qv, p.qv, p.head_dim_v)) return false;
  }
  if (p.keys.rows == 0 || p.keys.slots == 0) return true;  // nothing will be read
  const auto encode_keys = [&](TensorMap& map, const Rows& rows, int head_dim, int columns_of_box, bool& all_chunks) {
    const Dimension of_heads{p.heads_k, rows.head_stride, 1};
    const Dimension of_rows{p.keys.rows, rows.row_stride, arguments.box_keys};
    const Dimension of_slots{p.keys.slots, rows.slot_stride, 1};
    const int columns = chunk_row_bytes / bytes_of(rows.type);
    // Of whole chunks only: in a map that is cut into chunks, columns past the head would be the next one's, not zeros.
    // And where a block is one box: in tiles of wide.h a chunk has all its rows.
    const bool may_be = variant.stream() || (variant.wide && arguments.boxes == 1);
    all_chunks = may_be && head_dim > columns && head_dim % columns == 0;
    if (all_chunks) {
      const Dimension of_chunks{head_dim / columns, columns, columns_of_box / columns};
      return encode(map, rows, columns, std::array{of_rows, of_chunks, of_heads, of_slots}, promotion);
    }
    return encode(map, rows, head_dim, std::array{of_heads, of_rows, of_slots}, promotion);
  };
  return encode_keys(maps.k, p.k, p.head_dim, variant.head_dim, arguments.all_chunks_k) &&
         encode_keys(maps.v, p.v, p.head_dim_v, variant.head_dim_v / variant.v_slices(), arguments.all_chunks_v);
}

/// Decides which rows and heads share a tile.
void pack_rows(const Problem& p, const ForwardVariant& variant, ForwardArguments& arguments) {
  arguments.pack = choose_pack(p, variant);
  arguments.rows_of_block = variant.tiling(arguments.pack).tile_rows / variant.row_blocks();
  arguments.units = p.heads_q / arguments.pack;
  arguments.units_of_key_head = p.group() / arguments.pack;
}

/// Memory for the results of parts.
void take_parts(const Problem& p, const ForwardVariant& variant, std::int64_t tiles, int workers, Scratch& scratch,
                ForwardArguments& arguments) {
  if (arguments.cut.kind == Cut::Kind::counted && arguments.cut.size == 1) return;  // tiles are their only parts
  PartialResults& parts = arguments.parts;
  if (arguments.cut.kind == Cut::Kind::counted) parts.slots_of_tile = arguments.cut.size;
  if (arguments.cut.kind == Cut::Kind::aligned) {
    const std::int64_t blocks = divide_up(key_capacity(p), variant.block_keys);
    parts.slots_of_tile = static_cast<int>(clamp(divide_up(blocks, least_aligned_blocks), 1, most_aligned_parts));
  }
  const std::int64_t slots = arguments.cut.parts_are_grains() ? tiles * parts.slots_of_tile : slots_of(workers);
  require(slots < max_length, "the call would have ", slots, " parts, which must be fewer than 2**31");
  parts.rows =
      static_cast<int>(std::min<std::int64_t>(arguments.rows_of_block, std::int64_t{most_rows(p)} * arguments.pack));
  const std::int64_t rows = slots * parts.rows;
  parts.columns = variant.head_dim_v;
  parts.sums = scratch.take<float>(rows * (variant.head_dim_v + 2));
  parts.weights = parts.sums + rows * variant.head_dim_v;
}

/// That the call leaves to itself.
int multiprocessors_of(const Problem& p, const Device& gpu) { return std::max(1, gpu.multiprocessors - p.sm_margin); }

/// A launch of the kernel for some sequences of a call, or for all; and perhaps one that merges parts of tiles.
struct PreparedForward {
  Kernel kernel;
  Launch shape;
  ForwardArguments arguments;
  bool whole_tiles;  ///< none is cut
  std::optional<Kernel> merge = std::nullopt;
  Launch merge_shape = {};

  void launch() const {
    cuda::launch(kernel, shape, arguments);
    if (merge) cuda::launch(*merge, merge_shape, arguments);
  }
};

/// Has another launch merge the parts of tiles: a grid as long as the first one's, and of so many blocks for each tile.
void prepare_merge(PreparedForward& forward, const ForwardVariant& variant, const Device& gpu, Scratch& scratch) {
  constexpr std::int64_t most_blocks_of_tile = 16;
  const ElementType out = variant.types.out;
  const unsigned blocks = forward.shape.grid.x;
  const std::int64_t blocks_of_tile =
      std::min<std::int64_t>(divide_up(forward.arguments.rows_of_block, merge_threads / 32), most_blocks_of_tile);
  forward.arguments.parts.cut_tiles = scratch.take<CutTile>(blocks);
  forward.merge = kernels_of<merge_parts_source>().load(gpu, static_cast<std::uint64_t>(out),
                                                        [&] { return merge_parts_source(out); });
  forward.merge_shape = {.grid = {blocks, static_cast<unsigned>(blocks_of_tile)},
                         .block = {merge_threads},
                         .stream = forward.shape.stream};
}

/// `counters` are those of the launch.
PreparedForward prepare(const Problem& p, const Device& gpu, CUstream queue, Scratch& scratch, int* counters,
                        const ServedSequences& served = {}) {
  const int multiprocessors = multiprocessors_of(p, gpu);
  ForwardArguments arguments;
  arguments.problem = p;
  arguments.served = served;
  Alignment inputs;
  inputs.add(p.q, p.query_slots(), p.queries.rows, p.heads_q);
  if (p.qv.given()) inputs.add(p.qv, p.query_slots(), p.queries.rows, p.heads_q);
  inputs.add(p.k, p.keys.slots, p.keys.rows, p.heads_k);
  inputs.add(p.v, p.keys.slots, p.keys.rows, p.heads_k);
  Alignment results;
  results.add(p.out, p.query_slots(), p.queries.rows, p.heads_q);
  results.add(p.head_dim_v * bytes_of(p.out.type));
  arguments.wide_rows = results.bytes() == 16;
  ForwardVariant variant;
  const auto settle = [&](bool gather) {
    VariantChoice choice = choose_kernel(p, multiprocessors, served, gather);
    arguments.cut = choice.splits ? choose_cut(p) : Cut{};
    choice.plain = is_plain(arguments);
    variant = choose_variant(choice);
    pack_rows(p, variant, arguments);
    arguments.box_keys = choose_box(p.keys, variant);
    if (arguments.box_keys > 0) arguments.boxes = variant.block_keys / arguments.box_keys;
    return gather || (arguments.box_keys > 0 && encode_maps(p, variant, arguments));
  };
  if (inputs.bytes() < 16 || !settle(false)) settle(true);
  inputs.add(p.head_dim * bytes_of(p.k.type));
  inputs.add(p.head_dim_v * bytes_of(p.v.type));
  arguments.copy_bytes = inputs.bytes();
  arguments.heads_reciprocal = 1.0F / static_cast<float>(arguments.pack);
  const ScoreScales scales = scales_of(p);
  arguments.score_factor = scales.factor;
  arguments.exponent_scale = scales.exponent;
  arguments.keys_in_l2 = gpu.l2_bytes / 2 / ((p.head_dim + p.head_dim_v) * bytes_of(p.k.type));

  const std::int64_t tiles = most_tiles(p, variant, arguments.pack);
  require(tiles < max_length - gpu.multiprocessors, "q must have fewer than 2**31 tiles of ",
          variant.tiling(arguments.pack).tile_rows, " rows, got ", tiles);
  const int cluster = variant.merges_in_cluster ? cluster_of_tile(p, variant, multiprocessors) : variant.cluster_blocks;
  const std::int64_t most_at_once = variant.merges_in_cluster ? tiles : multiprocessors / cluster;
  int blocks = static_cast<int>(std::clamp<std::int64_t>(tiles, 1, most_at_once)) * cluster;
  if (served.which == Sequences::all) {
    const std::int64_t uncertain = p.ragged_queries() ? std::int64_t{p.batch - 1} * arguments.units : 0;
    arguments.expected_tiles = static_cast<int>(std::max<std::int64_t>(tiles - uncertain, 0));
  }
  if (variant.splits) {
    blocks = std::min(multiprocessors, counters_of_launch / variant.row_groups());
    if (served.which == Sequences::all) arguments.team = choose_team(p, variant, arguments.pack, blocks / cluster);
    blocks -= blocks % (arguments.team * cluster);
    take_parts(p, variant, tiles, blocks, scratch, arguments);
  }
  if (variant.e4m3 && !variant.carries_in_shared() &&
      divide_up(key_capacity(p), variant.block_keys) > variant.blocks_between_carries()) {
    arguments.carried_sums = scratch.take<float>(std::int64_t{blocks} * variant.carried_sums());
  }
  const Kernel kernel = kernels_of<source_of>().load(gpu, key_of(variant), [&] { return source_of(variant); });
  arguments.counters = counters;
  PreparedForward prepared{kernel,
                           {.grid = {static_cast<unsigned>(blocks)},
                            .block = {static_cast<unsigned>(variant.threads())},
                            .stream = queue,
                            .cluster_blocks = static_cast<unsigned>(cluster)},
                           arguments,
                           !variant.splits};
  if (arguments.parts.sums != nullptr && merges_apart(p, variant, served.which, blocks)) {
    prepare_merge(prepared, variant, gpu, scratch);
  }
  return prepared;
}

/// A launch of the kernel that says how many multiprocessors are to serve prompts.
struct PreparedPartition {
  Kernel kernel;
  Launch shape;
  Problem problem;
  ServedSequences served;
  int multiprocessors;
  int step;          ///< of those for prompts, the blocks of a cluster
  bool whole_tiles;  ///< of prompts

  void launch() const {
    cuda::launch(kernel, shape, problem, served.decode_rows, multiprocessors, step, whole_tiles,
                 served.prefill_workers);
  }
};

PreparedPartition prepare_partition(const Problem& p, const Device& gpu, CUstream queue, const ServedSequences& served,
                                    const PreparedForward& prefills) {
  return {.kernel = kernels_of<partition_source>().load(gpu, 0, partition_source),
          .shape = {.grid = {}, .block = {partition_threads}, .stream = queue},
          .problem = p,
          .served = served,
          .multiprocessors = multiprocessors_of(p, gpu),
          .step = static_cast<int>(prefills.shape.cluster_blocks),
          .whole_tiles = prefills.whole_tiles};
}

}  // namespace

void require_served(const Problem& p, int device_id) {
  require_hopper(device(device_id));
  for (const ElementType type : {p.q.type, p.k.type}) {
    if (type == ElementType::float32) fail(ErrorKind::not_implemented, "float32 is served on the CPU only");
  }
}

void forward(const Problem& problem, int device_id, void* stream, const Allocate& allocate) {
  if (problem.batch == 0 && !problem.ragged_queries()) return;
  const Device& gpu = device(device_id);
  const CurrentContext context(gpu);
  const auto queue = static_cast<CUstream>(stream);
  Scratch scratch(allocate, device_id, queue);
  Problem p = problem;
  // Nothing is written before all that may fail has been prepared.
  std::optional<Append> append;
  if (p.keys.appends && p.batch > 0) append.emplace(p, gpu, queue, scratch);
  if (p.queries.rows == 0 || p.heads_q == 0) {
    if (append) append->launch();
    return;
  }
  int* const counters_of_first = counters(queue);
  const int decode_rows = most_decode_rows(p, multiprocessors_of(p, gpu));
  if (decode_rows == 0) {
    const PreparedForward all = prepare(p, gpu, queue, scratch, counters_of_first);
    if (append) append->launch();
    all.launch();
    return;
  }
  ServedSequences served{Sequences::prefills, decode_rows, scratch.take<int>(1)};
  const PreparedForward prefills = prepare(p, gpu, queue, scratch, counters_of_first, served);
  const PreparedPartition partition = prepare_partition(p, gpu, queue, served, prefills);
  served.which = Sequences::decodes;
  p.max_seqlen_q = std::min(p.max_seqlen_q, decode_rows);  // of those that this launch serves
  const PreparedForward decodes = prepare(p, gpu, queue, scratch, counters_of_first + counters_of_launch, served);
  // The last one does not wait: nothing else that lets the next begin at once may come before it.
  const UninterruptedLaunches together;
  if (append) append->launch();
  partition.launch();
  prefills.launch();
  decodes.launch();
}

void scheduler_metadata(const Problem& p, int device_id, void* stream, int* out, std::int64_t stride) {
  if (p.batch == 0) return;
  require_served(p, device_id);
  const Device& gpu = device(device_id);
  const CurrentContext context(gpu);
  ForwardArguments arguments;
  arguments.problem = p;
  VariantChoice choice = choose_kernel(p, gpu.multiprocessors);
  choice.splits = true;
  choice.merges_in_cluster = false;
  const ForwardVariant variant = choose_variant(choice);
  pack_rows(p, variant, arguments);
  const Kernel kernel = kernels_of<scheduler_metadata_source>().load(
      gpu, variant.block_keys, [&] { return scheduler_metadata_source(variant.block_keys); });
  constexpr unsigned threads = 32;
  const Launch shape{.grid = {static_cast<unsigned>(divide_up(p.batch, threads))},
                     .block = {threads},
                     .stream = static_cast<CUstream>(stream)};
  launch(kernel, shape, arguments, out, static_cast<long long>(stride));
}

}  // namespace mate::cuda
