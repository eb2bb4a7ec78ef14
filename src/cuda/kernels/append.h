// Writes new keys and values into the cache, and rotates them and the queries.
#pragma once

#include "append_arguments.h"
#include "element.h"
#include "ptx/launch.h"

namespace mate::cuda {

/// A warp writes a row: rotated to `position` if `rotary` is given, divided by `descale` where its type changes, and
/// rounded once.
template <ElementType from, ElementType to>
__device__ inline void write_row(const void* source, void* target, int width, const Rotary* rotary, long long position,
                                 float descale = 1) {
  const auto read = [&](int column) { return widen(static_cast<const char*>(source) + column * bytes_of(from), from); };
  const auto write = [&](int column, float value) {
    if constexpr (from != to) value /= descale;
    narrow<to>(value, static_cast<char*>(target) + column * bytes_of(to));
  };
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
      const float a = read(first);
      const float b = read(second);
      write(first, a * cos - b * sin);
      write(second, a * sin + b * cos);
    }
  }
  for (int column = rotated + lane; column < width; column += 32) {
    if constexpr (from == to) {
      using Bits = typename BitsOf<bytes_of(to)>::Type;
      static_cast<Bits*>(target)[column] = static_cast<const Bits*>(source)[column];
    } else {
      write(column, read(column));
    }
  }
}

/// The blocks of one row of the grid share the rows of sequence b, warp by warp: first those of its new keys, then
/// those of its queries.
template <AppendTypes types>
__device__ void append_sequence(const AppendArguments& a, int b) {
  const Problem& p = a.problem;
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
    write_row<types.added, types.key>(p.k_new.at(new_slot, from, head), p.k.at(to.slot, to.row, head), p.head_dim,
                                      rotary, static_cast<long long>(sequence.rotary_base) + t,
                                      p.k_descale.at(b, head));
    write_row<types.added, types.key>(p.v_new.at(new_slot, from, head), p.v.at(to.slot, to.row, head), p.head_dim_v,
                                      nullptr, 0, p.v_descale.at(b, head));
  }

  if (rotary == nullptr) return;
  const long long q_rows = static_cast<long long>(sequence.lengths.sq) * p.heads_q;
  for (long long i = first; i < q_rows; i += step) {
    const int query = static_cast<int>(i / p.heads_q);
    const int head = static_cast<int>(i % p.heads_q);
    const long long row = static_cast<long long>(sequence.first_q) + query;
    const int advance = rotary->queries_advance ? query : 0;
    write_row<types.query, types.query>(p.q.at(p.query_slot(b), row, head), a.rotated_q.at(p.query_slot(b), row, head),
                                        p.head_dim, rotary, static_cast<long long>(sequence.rotary_base) + advance);
  }
}

template <AppendTypes types>
__device__ void append(const AppendArguments& a) {
  ptx::begin_overlapped();
#pragma unroll 1
  for (int b = blockIdx.y; b < a.problem.batch; b += gridDim.y) append_sequence<types>(a, b);
}

}  // namespace mate::cuda
