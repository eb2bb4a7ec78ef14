// Writes new keys and values into the cache, and rotates them and the queries.
#pragma once

#include "append_arguments.h"
#include "element.h"
#include "ptx/launch.h"

namespace mate::cuda {

/// A warp writes a row: rotated to `position` if `rotary` is given, and rounded once.
template <ElementType element>
__device__ inline void write_row(const void* source, void* target, int width, const Rotary* rotary,
                                 long long position) {
  const auto* const from = static_cast<const unsigned short*>(source);
  auto* const to = static_cast<unsigned short*>(target);
  const int lane = threadIdx.x % 32;
  int rotated = 0;
  if (rotary != nullptr) {
    rotated = rotary->dim;
    const int half = rotated / 2;
    const int table_row = clamp(position, 0, rotary->rows - 1);
    const char* const cos_row = static_cast<const char*>(rotary->cos_row(table_row));
    const char* const sin_row = static_cast<const char*>(rotary->sin_row(table_row));
    const int bytes = bytes_of(rotary->type);
    for (int i = lane; i < half; i += 32) {
      const int first = rotary->interleaved ? 2 * i : i;
      const int second = rotary->interleaved ? 2 * i + 1 : i + half;
      const float cos = widen(cos_row + i * bytes, rotary->type);
      const float sin = widen(sin_row + i * bytes, rotary->type);
      const float a = widen(from + first, element);
      const float b = widen(from + second, element);
      const unsigned both = pack<element>(a * cos - b * sin, a * sin + b * cos);
      to[first] = static_cast<unsigned short>(both);
      to[second] = static_cast<unsigned short>(both >> 16);
    }
  }
  for (int column = rotated + lane; column < width; column += 32) to[column] = from[column];
}

/// The blocks of one row of the grid share the rows of a sequence, warp by warp: first those of its new keys, then
/// those of its queries.
template <ElementType element>
__device__ void append(const AppendArguments& a) {
  ptx::begin_overlapped();
  const Problem& p = a.problem;
  const int b = blockIdx.y;
  const Sequence sequence = p.sequence(b);
  const Rotary* const rotary = p.rotary.given() ? &p.rotary : nullptr;
  const int warps = blockDim.x / 32;
  const long long first = static_cast<long long>(blockIdx.x) * warps + threadIdx.x / 32;
  const long long step = static_cast<long long>(gridDim.x) * warps;

  const int new_slot = p.keys.cu_seqlens_new.given() ? 0 : b;
  const long long new_rows = static_cast<long long>(sequence.new_keys) * p.heads_k;
  for (long long i = first; i < new_rows; i += step) {
    const int t = static_cast<int>(i / p.heads_k);
    const int head = static_cast<int>(i % p.heads_k);
    const Location to = locate_position(p.keys, sequence, static_cast<long long>(sequence.append_at) + t);
    if (to.slot < 0 || to.slot >= p.keys.slots) continue;  // a page that there is not
    const long long from = static_cast<long long>(sequence.first_new) + t;
    write_row<element>(p.k_new.at(new_slot, from, head), p.k.at(to.slot, to.row, head), p.head_dim, rotary,
                       static_cast<long long>(sequence.rotary_base) + t);
    write_row<element>(p.v_new.at(new_slot, from, head), p.v.at(to.slot, to.row, head), p.head_dim_v, nullptr, 0);
  }

  if (rotary == nullptr) return;
  const long long q_rows = static_cast<long long>(sequence.lengths.sq) * p.heads_q;
  for (long long i = first; i < q_rows; i += step) {
    const int query = static_cast<int>(i / p.heads_q);
    const int head = static_cast<int>(i % p.heads_q);
    const long long row = static_cast<long long>(sequence.first_q) + query;
    const int advance = rotary->queries_advance ? query : 0;
    write_row<element>(p.q.at(p.query_slot(b), row, head), a.rotated_q.at(p.query_slot(b), row, head), p.head_dim,
                       rotary, static_cast<long long>(sequence.rotary_base) + advance);
  }
}

}  // namespace mate::cuda
