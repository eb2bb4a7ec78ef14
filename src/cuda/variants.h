// The forward kernels that there are, and which of them a call takes.
#pragma once

#include <cstdint>
#include <vector>

#include "compiler.h"
#include "kernels/append_arguments.h"
#include "kernels/forward_variant.h"

namespace mate::cuda {

/// What a variant follows from.
struct VariantChoice {
  int head_dim = 0;
  int head_dim_v = 0;
  TensorTypes types;
  Scores scores = Scores::products;
  bool gather = false;
  bool splits = false;
  bool few_rows = false;    ///< no sequence that is served has more packed rows than a consumer
  int stream_rows = 0;      ///< rows of a tile of the kernel of stream.h; 0: there are too many for it
  int transposed_rows = 0;  ///< rows of a tile of that of transposed.h: see transposed_rows_for(); 0: the most
  bool narrow =
      false;  ///< a block of keys is as wide as a tile is high: one lies on the diagonal, and few keys fill it
  bool low_tiles = false;          ///< of small heads: two consumers' rows, not three's
  bool alike = false;              ///< who adds up what does not depend on what else is chosen, so that bits do not
  bool qv = false;                 ///< there are queries of values
  bool plain = false;              ///< the call asks for nothing rare (is_plain)
  bool clusters = false;           ///< tiles may be those of clusters of blocks of threads
  bool merges_in_cluster = false;  ///< such a cluster shares out the keys of a tile (ForwardVariant)
};

/// Whether registers are enough for a third consumer of prompts.
bool has_small_heads(const VariantChoice& choice);

/// How many packed rows of a sequence the kernel of stream.h can take for tensors of these types and head sizes: 0
/// where it takes none.
int most_stream_rows(const TensorTypes& types, int head_dim, int head_dim_v);

/// Rows of a tile of stream.h that holds so many packed rows; 0 where there are too many.
int stream_rows_for(const TensorTypes& types, int head_dim, int head_dim_v, std::int64_t rows);

/// Rows of a tile of transposed.h for sequences of so many packed rows at most: the fewest that hold them.
int transposed_rows_for(std::int64_t rows);

/// The largest tiles that registers and shared memory hold.
ForwardVariant choose_variant(const VariantChoice& choice);

/// What tells variants apart, in a number.
std::uint64_t key_of(const ForwardVariant& variant);

KernelSource source_of(const ForwardVariant& variant);

/// Of the kernel that counts the steps of sequences, for blocks of so many keys.
KernelSource scheduler_metadata_source(int block_keys);

/// Of the kernel that appends to a cache of keys and values, and of that which merges partial results.
KernelSource append_source(const AppendTypes& types);
KernelSource combine_source();

/// Of the kernel that merges parts of tiles, rounded to such a type.
KernelSource merge_parts_source(ElementType out);

/// Of the kernel that partitions the multiprocessors between two launches of a call.
KernelSource partition_source();

/// The kernels that calls with these head sizes and types may need, for whatever else they ask - causal or not, aligned
/// or not - but for a softmax_scale that is not positive.
std::vector<KernelSource> kernels_for(int head_dim, int head_dim_v, const TensorTypes& types, bool softcap, bool qv);

}  // namespace mate::cuda
