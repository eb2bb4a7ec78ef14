// Which kernel serves a call, how its rows are packed, and how its keys are shared out: all that the host decides, from
// what it knows.
#pragma once

#include <cstdint>

#include "attention/problem.h"
#include "attention/shares.h"
#include "kernels/forward_arguments.h"
#include "variants.h"

namespace mate::cuda {

/// What scores are multiplied by: see ForwardArguments.
struct ScoreScales {
  float factor = 1;
  float exponent = 1;
};

ScoreScales scales_of(const Problem& p);

/// Query rows of the longest sequence, as far as the host knows.
int most_rows(const Problem& p);

/// Keys that there is room for.
int key_capacity(const Problem& p);

/// Query heads that share a tile: those of a group, or an equal part of them, where that makes fewer tiles.
int choose_pack(const Problem& p, const ForwardVariant& variant);

/// At least as many tiles as there are, of all units.
std::int64_t most_tiles(const Problem& p, const ForwardVariant& variant, int pack);

/// Whether parts of tiles are merged by a launch of its own. It adds up weights in another order, so that it is not for
/// batch-invariant calls, and its blocks would wait on multiprocessors that the call is to leave free.
bool merges_apart(const Problem& p, const ForwardVariant& variant, Sequences which, int workers);

/// Rows of keys that the copy engine can fetch together, as many as divide a block and a page; 0 where that is fewer
/// than the eight rows of a swizzled tile, or where sequences begin anywhere in a page. Each block of a cluster fetches
/// as many boxes.
int choose_box(const KeyLayout& keys, const ForwardVariant& variant);

/// Blocks of threads of a cluster that share out the keys of a tile, so that all tiles are taken at once: 1 where tiles
/// are too many for that.
int cluster_of_tile(const Problem& p, const ForwardVariant& variant, int multiprocessors);

/// How many tiles of each unit of a sequence are taken at the same time, since they need much the same keys: where all
/// sequences have as many tiles, and the positions of their queries are close together.
int choose_team(const Problem& p, const ForwardVariant& variant, int pack, int workers);

/// How the keys of tiles are cut where they are shared out.
Cut choose_cut(const Problem& p);

/// Where two launches serve a call, one of them the sequences that use few query rows, how many these use at most; else
/// 0. With batch_invariant a sequence's kernel then follows from its own rows, whatever the others are.
int most_decode_rows(const Problem& p, int multiprocessors);

/// The kernel that serves a call, or the sequences of it that a launch serves, on so many multiprocessors, but for
/// whether the call is plain. `gather` says that rows are loaded one by one.
VariantChoice choose_kernel(const Problem& p, int multiprocessors, const ServedSequences& served = {},
                            bool gather = false);

}  // namespace mate::cuda
