#include "variants.h"

#include <algorithm>
#include <cassert>
#include <set>
#include <string>
#include <type_traits>

#include "attention/check.h"
#include "kernels/forward_arguments.h"

namespace mate::cuda {
namespace {

constexpr int largest_narrow_head_dim = 256;
constexpr int largest_narrow_head_dim_of_prompts = 320;
constexpr int fewest_stream_rows = 8;
constexpr int largest_stream_rows = 16;
constexpr int widest_block_keys = 176;
constexpr int most_stages = 8;
constexpr int most_wide_stages = 4;

constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

/// Blocks of a power of two fit pages, whose size is one too.
int power_of_two_below(int x) {
  int power = 16;
  while (2 * power <= x) power *= 2;
  return power;
}

/// What a choice says of any kernel.
ForwardVariant variant_of(const VariantChoice& choice) {
  ForwardVariant variant;
  variant.types = choice.types;
  variant.scores = choice.scores;
  variant.gather = choice.gather;
  variant.splits = choice.splits;
  // Not those that are alike, since batch-invariant calls cut keys as plain ones do not.
  variant.plain = choice.plain && !choice.alike;
  return variant;
}

/// Blocks of threads that have a tile together. Rows that are gathered, or widened, are not fetched for others.
/// Consumers of small heads use a block of keys for too short a time to agree with those of another block.
int cluster_blocks_for(const ForwardVariant& variant, const VariantChoice& choice) {
  const bool possible = !variant.gather && (variant.wide || !variant.splits) && !variant.widens() &&
                        !variant.merges_in_cluster && !choice.few_rows && !choice.alike && !has_small_heads(choice);
  return choice.clusters && possible ? 2 : 1;
}

/// The most keys of a block that registers and shared memory hold.
int most_block_keys(const ForwardVariant& variant, bool narrow) {
  const bool capped = variant.scores == Scores::capped;
  // A thread keeps sums, scores and weights, and needs some registers besides, more where scores are capped.
  int other_registers = variant.warpgroups == 3 ? 32 : 36;
  if (capped) other_registers += variant.gather || variant.splits ? 32 : 20;
  const int registers = variant.consumer_registers() - other_registers - variant.head_dim_v / 2;
  const int most = capped && variant.warpgroups == 3                      ? 96
                   : capped || narrow || variant.gather || variant.splits ? 128
                                                                          : widest_block_keys;
  const int element_bytes = bytes_of(variant.element());
  const int step = 32 / element_bytes;  // keys that an instruction multiplies
  ForwardVariant tried = variant;
  tried.q_stages = 1;
  tried.block_keys = most / step * step;
  const auto fits = [&] {
    const int needed = tried.block_keys / 2 + tried.block_keys * element_bytes / 8;  // for scores and weights
    return needed <= registers && tried.shared_bytes() <= most_shared_bytes;
  };
  while (!fits()) tried.block_keys -= step;
  return variant.splits ? power_of_two_below(tried.block_keys) : tried.block_keys;
}

/// Where e4m3 is multiplied as it is, sums of more columns leave registers only if others need few.
constexpr int most_e4m3_columns = 192;

/// Whether e4m3 is multiplied as it is.
bool multiplies_e4m3(const VariantChoice& choice) {
  const bool fits = choice.head_dim_v <= most_e4m3_columns || !(choice.gather || choice.splits);
  // Of few rows memory is the limit, and weights that are more exact cost nothing.
  return choice.types.all_e4m3() && fits && !choice.few_rows && !choice.alike;
}

/// A variant of forward.h, but for the width of its blocks and what follows from it.
ForwardVariant begin_variant(const VariantChoice& choice) {
  ForwardVariant variant = variant_of(choice);
  variant.e4m3 = multiplies_e4m3(choice);
  variant.head_dim = round_up(choice.head_dim, variant.e4m3 ? 32 : 16);
  // An instruction sums up to 256 columns, two of them more: those of whole chunks.
  variant.head_dim_v = round_up(choice.head_dim_v, choice.head_dim_v <= largest_narrow_head_dim ? 16 : chunk_columns);
  variant.merges_in_cluster = choice.merges_in_cluster && !choice.gather && !choice.splits && !choice.alike &&
                              !(variant.e4m3 && choice.head_dim_v > most_e4m3_columns);
  const bool low = choice.low_tiles && !choice.alike;
  const bool has_three = has_small_heads(choice) && !low && !choice.gather && !choice.splits &&
                         !variant.merges_in_cluster && !variant.widens();
  variant.warpgroups = choice.few_rows ? 1 : has_three ? 3 : 2;
  variant.stages = 2;
  variant.cluster_blocks = cluster_blocks_for(variant, choice);
  if (variant.prepares()) variant.fetched_stages = 2;
  return variant;
}

/// The width that all variants of these head sizes can have.
int common_block_keys(const VariantChoice& choice) {
  int keys = widest_block_keys;
  for (int choices = 0; choices < 8; ++choices) {
    VariantChoice other = choice;
    other.gather = (choices & 1) != 0;
    other.splits = (choices & 2) != 0;
    other.few_rows = (choices & 4) != 0;
    keys = std::min(keys, most_block_keys(begin_variant(other), true));
  }
  return power_of_two_below(keys);
}

/// Fills what is left of shared memory with blocks that are yet to be prepared.
void fetch_further_ahead(ForwardVariant& variant) {
  if (!variant.prepares()) return;
  const int left = most_shared_bytes - variant.shared_bytes();
  const int stages = variant.fetched_stages + left / (variant.fetched_k_bytes() + variant.fetched_v_bytes());
  variant.fetched_stages = std::clamp(stages, variant.fetched_stages, most_stages);
}

/// The largest tiles of forward.h that registers and shared memory hold.
ForwardVariant forward_variant(const VariantChoice& choice) {
  ForwardVariant variant = begin_variant(choice);
  const bool narrow = choice.narrow || variant.merges_in_cluster;
  variant.block_keys = choice.alike ? common_block_keys(choice) : most_block_keys(variant, narrow);
  if (choice.splits && !choice.gather && !choice.alike) {
    // How keys are cut must not depend on where they lie.
    VariantChoice gathers = choice;
    gathers.gather = true;
    variant.block_keys = std::min(variant.block_keys, forward_variant(gathers).block_keys);
  }
  const int stage_bytes = variant.k_bytes() + variant.v_bytes();
  if (variant.prepares()) {
    variant.q_stages =
        choice.few_rows && 2 * variant.q_bytes() + 2 * stage_bytes + variant.fetched_bytes() <= variant.tile_bytes()
            ? 2
            : 1;
    fetch_further_ahead(variant);
    return variant;
  }
  if (choice.few_rows || choice.splits) {
    // Keys are a stream that has to flow on while a tile ends and the next begins.
    const int q_stages = choice.few_rows ? 2 : 1;
    const int stages = (variant.tile_bytes() - q_stages * variant.q_bytes()) / stage_bytes;
    variant.stages = std::clamp(stages, variant.stages, most_stages);
  }
  variant.q_stages = variant.stages * stage_bytes + 2 * variant.q_bytes() <= variant.tile_bytes() ? 2 : 1;
  return variant;
}

/// Whether heads are those of wide.h or transposed.h. A consumer of prompts has registers for somewhat wider sums than
/// others, if its block of keys is small.
constexpr bool is_wide(const VariantChoice& choice) {
  const bool of_prompts = !choice.splits && !choice.few_rows && !choice.gather && !choice.alike &&
                          choice.scores == Scores::products && choice.types.key != ElementType::float8_e4m3;
  const int most = of_prompts ? largest_narrow_head_dim_of_prompts : largest_narrow_head_dim;
  return choice.qv || std::max(choice.head_dim, choice.head_dim_v) > most;
}

/// Each warp has a power of two of the values' columns. Blocks are as wide for all calls.
ForwardVariant transposed_variant(const VariantChoice& choice) {
  constexpr int narrowest = 256;
  // Loaders that gather leave too few registers for sums of more.
  const int most_rows = choice.gather ? 32 : 64;
  ForwardVariant variant = variant_of(choice);
  variant.wide = true;
  variant.qv = choice.qv;
  variant.head_dim = round_up(choice.head_dim, chunk_columns);
  variant.head_dim_v = choice.head_dim_v <= narrowest ? narrowest : 2 * narrowest;
  variant.transposed_rows = choice.transposed_rows > 0 ? std::min(choice.transposed_rows, most_rows) : most_rows;
  // Two have registers for few rows, and add up weights in another order.
  const bool has_two =
      !choice.alike && (variant.transposed_rows == 16 || (variant.transposed_rows == 32 && !choice.gather));
  const int scorers = has_two ? 2 : 1;
  variant.warpgroups = scorers + variant.adders();
  variant.q_stages = 1;
  variant.block_keys = 64;
  // There is room for one block beside 64 rows of q and qv of 512 columns each, and for two beside fewer.
  const int left = variant.tile_bytes() - variant.q_bytes() - variant.p_bytes();
  variant.stages = std::min(left / (variant.k_bytes() + variant.v_bytes()), most_stages);
  return variant;
}

/// Each consumer has whole chunks of the values' columns. Blocks are as wide for all calls of these head sizes.
ForwardVariant wide_variant(const VariantChoice& choice) {
  constexpr int consumers = 2;
  // Products of fewer keys wait for shared memory: a second stage is not worth that. Blocks of twice as many have to
  // fit twice, and their scores into registers beside the sums.
  constexpr int good_keys = 64;
  constexpr int most_columns_of_wider = 128;
  ForwardVariant variant = variant_of(choice);
  variant.wide = true;
  variant.qv = choice.qv;
  variant.head_dim = round_up(choice.head_dim, chunk_columns);
  variant.head_dim_v = round_up(choice.head_dim_v, consumers * chunk_columns);
  variant.warpgroups = consumers;
  variant.cluster_blocks = cluster_blocks_for(variant, choice);
  variant.q_stages = 1;
  const auto stages = [&] {
    return (variant.tile_bytes() - variant.q_bytes() - variant.p_bytes()) / (variant.k_bytes() + variant.v_bytes());
  };
  variant.block_keys = 2 * good_keys;
  if (stages() < 2 || variant.consumer_columns() > most_columns_of_wider) variant.block_keys = good_keys;
  while (stages() < 1) variant.block_keys /= 2;
  variant.stages = std::min(stages(), most_wide_stages);
  if (variant.shared_bytes() > most_shared_bytes) --variant.stages;  // barriers of more than two need more room
  return variant;
}

/// Columns of values as the kernel of stream.h takes them: lanes take those of e4m3 by 64 or by 128.
int stream_columns_v(const TensorTypes& types, int head_dim) {
  return round_up(head_dim, types.key != ElementType::float8_e4m3 || head_dim <= 64 ? 64 : 128);
}

/// Blocks are as many keys as warps have enough of, or half of that where they are large.
ForwardVariant stream_variant(const VariantChoice& choice) {
  constexpr int most_keys = 128;
  constexpr int most_columns = 256;  // of that many keys and values together
  ForwardVariant variant = variant_of(choice);
  variant.stream_rows = choice.stream_rows;
  variant.head_dim = round_up(choice.head_dim, 64);
  variant.head_dim_v = stream_columns_v(choice.types, choice.head_dim_v);
  variant.q_stages = 2;
  const bool fits = variant.head_dim + variant.head_dim_v <= most_columns;
  variant.block_keys = fits ? most_keys : most_keys / 2;
  // A warp has 16 keys of a block, or more where loaders need the other warps and bits may depend on that.
  variant.warpgroups = (variant.gather && !choice.alike) || !fits ? 1 : 2;
  const int others = variant.q_stages * variant.q_bytes() + variant.warp_sums_bytes();
  variant.stages = std::min((variant.tile_bytes() - others) / (variant.k_bytes() + variant.v_bytes()), most_stages);
  return variant;
}

const char* name_of(ElementType type) {
  switch (type) {
    case ElementType::float32:
      return "float32";
    case ElementType::float16:
      return "float16";
    case ElementType::bfloat16:
      return "bfloat16";
    case ElementType::float8_e4m3:
      return "float8_e4m3";
  }
  return "";
}

/// As it is written in a name.
std::string name_of(const TensorTypes& types) {
  if (types.query == types.key && types.key == types.out) return name_of(types.key);
  return join(name_of(types.query), types.key == types.query ? "" : join("_", name_of(types.key)),
              types.out == types.query ? "" : join("_to_", name_of(types.out)));
}

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

/// Calls visit(name, value, bits, unit) for each field of a variant but its types: numbers are multiples of `unit`, 1
/// if it is left out, and that many fit so many bits.
template <typename Visit>
void for_each_field(const ForwardVariant& v, const Visit& visit) {
  visit("head_dim", v.head_dim, 6, 16);
  visit("head_dim_v", v.head_dim_v, 6, 16);
  visit("warpgroups", v.warpgroups, 3);
  visit("block_keys", v.block_keys, 5, 16);
  visit("stages", v.stages, 4);
  visit("fetched_stages", v.fetched_stages, 4);
  visit("q_stages", v.q_stages, 3);
  visit("scores", v.scores, 2);
  visit("gather", v.gather, 1);
  visit("splits", v.splits, 1);
  visit("wide", v.wide, 1);
  visit("stream_rows", v.stream_rows, 5);
  visit("transposed_rows", v.transposed_rows, 3, 16);
  visit("qv", v.qv, 1);
  visit("e4m3", v.e4m3, 1);
  visit("cluster_blocks", v.cluster_blocks, 2);
  visit("merges_in_cluster", v.merges_in_cluster, 1);
  visit("plain", v.plain, 1);
}

}  // namespace

bool has_small_heads(const VariantChoice& choice) { return std::max(choice.head_dim, choice.head_dim_v) <= 64; }

int most_stream_rows(const TensorTypes& types, int head_dim, int head_dim_v) {
  constexpr int most_sums = 2048;  // of a warp
  if (std::max(head_dim, head_dim_v) > largest_narrow_head_dim) return 0;
  const int columns = stream_columns_v(types, head_dim_v);
  return largest_stream_rows * columns <= most_sums ? largest_stream_rows : fewest_stream_rows;
}

int stream_rows_for(const TensorTypes& types, int head_dim, int head_dim_v, std::int64_t rows) {
  const int most = most_stream_rows(types, head_dim, head_dim_v);
  if (rows > most) return 0;
  return rows <= fewest_stream_rows ? fewest_stream_rows : most;
}

int transposed_rows_for(std::int64_t rows) { return rows <= 16 ? 16 : rows <= 32 ? 32 : 64; }

ForwardVariant choose_variant(const VariantChoice& choice) {
  if (is_wide(choice)) {
    return choice.types.key == ElementType::float8_e4m3 ? transposed_variant(choice) : wide_variant(choice);
  }
  if (choice.stream_rows > 0) return stream_variant(choice);
  const ForwardVariant variant = forward_variant(choice);
  if (!variant.merges_in_cluster || variant.has_room_for_part()) return variant;
  VariantChoice other = choice;
  other.merges_in_cluster = false;
  return forward_variant(other);
}

std::uint64_t key_of(const ForwardVariant& v) {
  std::uint64_t key = 0;
  const auto append = [&](const char*, auto value, int bits, int unit = 1) {
    const auto number = static_cast<std::uint64_t>(value);
    assert(number % unit == 0 && number / unit < std::uint64_t{1} << bits);
    key = key << bits | number / unit;
  };
  for (const ElementType type : {v.types.query, v.types.key, v.types.out}) append("types", type, 2);
  for_each_field(v, append);
  return key;
}

KernelSource source_of(const ForwardVariant& v) {
  KernelSource source;
  const char* const kernel = v.stream() ? "stream" : v.transposed() ? "transposed" : v.wide ? "wide" : "forward";
  source.name = join(kernel, "_", name_of(v.types), "_d", v.head_dim, "_v", v.head_dim_v, v.qv ? "_qv" : "", "_rows",
                     v.tile_rows(), "_keys", v.block_keys, v.stream() ? join("_warps", v.stream_warps()) : "",
                     v.transposed() ? join("_scorers", v.scorers()) : "",
                     v.scores == Scores::products ? "" : join("_", name_of(v.scores)), v.widens() ? "_widened" : "",
                     v.gather ? "_gather" : "", v.splits ? "_splits" : "", v.cluster_blocks > 1 ? "_clusters" : "",
                     v.merges_in_cluster ? "_merged" : "", v.plain ? "_plain" : "");
  source.text = join("#include \"", kernel, ".h\"\n\nextern \"C\" __global__ void __launch_bounds__(", v.threads(),
                     ", 1)\n", source.name,
                     "(const __grid_constant__ mate::cuda::ForwardArguments arguments) {\n"
                     "  constexpr mate::cuda::ForwardVariant variant{\n",
                     "      .types = {mate::ElementType::", name_of(v.types.query),
                     ", mate::ElementType::", name_of(v.types.key), ", mate::ElementType::", name_of(v.types.out), "}");
  for_each_field(v, [&](const char* name, auto value, int, int = 1) {
    source.text += join(",\n      .", name, " = ");
    if constexpr (std::is_same_v<decltype(value), Scores>) {
      source.text += join("mate::cuda::Scores::", name_of(value));
    } else if constexpr (std::is_same_v<decltype(value), bool>) {
      source.text += value ? "true" : "false";
    } else {
      source.text += std::to_string(value);
    }
  });
  source.text += join("};\n  mate::cuda::", kernel, "<variant>(arguments);\n}\n");
  source.shared_bytes = v.shared_bytes();
  return source;
}

KernelSource scheduler_metadata_source(int block_keys) {
  KernelSource source;
  source.name = join("scheduler_metadata_keys", block_keys);
  source.text = join("#include \"scheduler_metadata.h\"\n\nextern \"C\" __global__ void ", source.name,
                     "(const __grid_constant__ mate::cuda::ForwardArguments arguments, int* out, long long stride) {\n",
                     "  constexpr mate::cuda::ForwardVariant variant{.block_keys = ", block_keys,
                     ", .splits = true};\n", "  mate::cuda::scheduler_metadata<variant>(arguments, out, stride);\n}\n");
  return source;
}

KernelSource append_source(const AppendTypes& types) {
  KernelSource source;
  source.name = join("append_", name_of(types.added), "_to_", name_of(types.key), "_for_", name_of(types.query));
  // One block to a multiprocessor: with registers for two of them some variants spill.
  source.text = join("#include \"append.h\"\n\nextern \"C\" __global__ void __launch_bounds__(", append_threads,
                     ", 1) ", source.name, "(const __grid_constant__ mate::cuda::AppendArguments arguments) {\n",
                     "  mate::cuda::append<mate::cuda::AppendTypes{mate::ElementType::", name_of(types.query),
                     ", mate::ElementType::", name_of(types.added), ", mate::ElementType::", name_of(types.key),
                     "}>(arguments);\n}\n");
  return source;
}

KernelSource combine_source() {
  KernelSource source;
  source.name = "combine";
  source.text =
      "#include \"combine.h\"\n\nextern \"C\" __global__ void combine(const __grid_constant__ mate::CombineProblem "
      "problem) {\n  mate::cuda::combine(problem);\n}\n";
  return source;
}

KernelSource merge_parts_source(ElementType out) {
  KernelSource source;
  source.name = join("merge_parts_to_", name_of(out));
  source.text = join("#include \"merge_parts.h\"\n\nextern \"C\" __global__ void __launch_bounds__(", merge_threads,
                     ", 1) ", source.name, "(const __grid_constant__ mate::cuda::ForwardArguments arguments) {\n",
                     "  mate::cuda::merge_parts<mate::ElementType::", name_of(out), ">(arguments);\n}\n");
  return source;
}

KernelSource partition_source() {
  KernelSource source;
  source.name = "partition_multiprocessors";
  source.text = join(
      "#include \"side_by_side.h\"\n\nextern \"C\" __global__ void __launch_bounds__(", partition_threads, ") ",
      source.name,
      "(const __grid_constant__ mate::Problem problem, int decode_rows, int workers, int step, bool whole_tiles, int* "
      "out) {\n  mate::cuda::partition_multiprocessors(problem, decode_rows, workers, step, whole_tiles, out);\n}\n");
  return source;
}

std::vector<KernelSource> kernels_for(int head_dim, int head_dim_v, const TensorTypes& types, bool softcap, bool qv) {
  std::vector<KernelSource> sources;
  std::set<std::string> names;
  const auto add = [&](const KernelSource& source) {
    if (names.insert(source.name).second) sources.push_back(source);
  };
  for (int choices = 0; choices < 128; ++choices) {
    VariantChoice choice{head_dim, head_dim_v, types, softcap ? Scores::capped : Scores::products};
    choice.qv = qv;
    bool* const flags[] = {&choice.gather,   &choice.splits, &choice.few_rows,
                           &choice.narrow,   &choice.alike,  &choice.merges_in_cluster,
                           &choice.low_tiles};
    for (int i = 0; i < 7; ++i) *flags[i] = (choices >> i & 1) != 0;
    // Keys of so few rows are always shared out.
    if (choice.few_rows && !choice.splits && !choice.alike && !choice.merges_in_cluster) continue;
    for (const int rows : {64, 32, largest_stream_rows, 1}) {
      choice.transposed_rows = transposed_rows_for(choice.few_rows ? rows : 64);
      choice.stream_rows = choice.few_rows ? stream_rows_for(types, head_dim, head_dim_v, rows) : 0;
      if (choice.stream_rows > 0 && !choice.splits) continue;  // likewise
      for (const auto& [plain, clusters] : {std::pair{false, false}, {false, true}, {true, false}, {true, true}}) {
        choice.plain = plain;
        choice.clusters = clusters;
        const ForwardVariant variant = choose_variant(choice);
        if (variant.merges_in_cluster != choice.merges_in_cluster) continue;
        add(source_of(variant));
        if (variant.splits) add(scheduler_metadata_source(variant.block_keys));
      }
    }
  }
  for (const ElementType added : {types.query, types.key}) add(append_source({types.query, added, types.key}));
  add(partition_source());
  add(combine_source());
  add(merge_parts_source(types.out));
  return sources;
}

}  // namespace mate::cuda
