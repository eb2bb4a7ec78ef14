// Matrix products of a warpgroup (wgmma): 64 rows, K = 16 of elements of 16 bits, or 32 of e4m3; sums in float32.
//
// The products run on their own while the threads go on: wgmma_fence() before the first of a group where registers it
// uses were written, wgmma_commit() after the last, wgmma_wait<n>() until at most n groups are still running, and
// hold() on whatever registers the finished products wrote, so that the compiler moves no use of them before the wait.
#pragma once

#include "element.h"

namespace mate::cuda::ptx {

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int running>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(running) : "memory");
}

template <int size>
__device__ inline void hold(float (&registers)[size]) {
#pragma unroll
  for (int i = 0; i < size; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

/// How a matrix in shared memory is stored: its reduced dimension (K) contiguous, or the other one (MN).
enum class Major { k, mn };

/// A matrix in shared memory made of chunks of rows of 128 bytes, swizzled by 128 bytes as the copy engine writes them:
/// the lower half of its descriptor, the upper one being the same for all. Each chunk is aligned to 1024 bytes.
/// `chunk_bytes` is the distance of two chunks (MN-major only). All lanes of a warp pass the same.
__device__ inline unsigned matrix_at(unsigned shared_address, int chunk_bytes = 0) {
  const unsigned matrix = (shared_address & 0x3ffff) >> 4 | static_cast<unsigned>(chunk_bytes >> 4) << 16;
  // What comes from one lane the compiler knows to be the same in all: it then goes to a uniform register once.
  return __shfl_sync(~0U, matrix, 0);
}

/// The matrix that begins `bytes` further on.
__device__ inline unsigned advance(unsigned matrix, int bytes) { return matrix + (bytes >> 4); }

// The upper half of a descriptor: eight rows are 1024 bytes apart, 128 bytes are swizzled.
#define MATE_DESCRIPTOR(name, low) ".reg .b64 " name ";\nmov.b64 " name ", {%" low ", 0x40000040};\n"

// The registers of an accumulator, eight at a time, as operands and in the text of the instruction.
#define MATE_OUT(i)                                                                                                   \
  "+f"(d[first + 8 * (i)]), "+f"(d[first + 8 * (i) + 1]), "+f"(d[first + 8 * (i) + 2]), "+f"(d[first + 8 * (i) + 3]), \
      "+f"(d[first + 8 * (i) + 4]), "+f"(d[first + 8 * (i) + 5]), "+f"(d[first + 8 * (i) + 6]),                       \
      "+f"(d[first + 8 * (i) + 7])
#define MATE_OUT_1 MATE_OUT(0)
#define MATE_OUT_2 MATE_OUT_1, MATE_OUT(1)
#define MATE_OUT_3 MATE_OUT_2, MATE_OUT(2)
#define MATE_OUT_4 MATE_OUT_3, MATE_OUT(3)
#define MATE_OUT_5 MATE_OUT_4, MATE_OUT(4)
#define MATE_OUT_6 MATE_OUT_5, MATE_OUT(5)
#define MATE_OUT_7 MATE_OUT_6, MATE_OUT(6)
#define MATE_OUT_8 MATE_OUT_7, MATE_OUT(7)
#define MATE_OUT_9 MATE_OUT_8, MATE_OUT(8)
#define MATE_OUT_10 MATE_OUT_9, MATE_OUT(9)
#define MATE_OUT_11 MATE_OUT_10, MATE_OUT(10)
#define MATE_OUT_12 MATE_OUT_11, MATE_OUT(11)
#define MATE_OUT_13 MATE_OUT_12, MATE_OUT(12)
#define MATE_OUT_14 MATE_OUT_13, MATE_OUT(13)
#define MATE_OUT_15 MATE_OUT_14, MATE_OUT(14)
#define MATE_OUT_16 MATE_OUT_15, MATE_OUT(15)
#define MATE_TEXT_1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MATE_TEXT_2 MATE_TEXT_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MATE_TEXT_3 MATE_TEXT_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MATE_TEXT_4 MATE_TEXT_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MATE_TEXT_5 MATE_TEXT_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MATE_TEXT_6 MATE_TEXT_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MATE_TEXT_7 MATE_TEXT_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define MATE_TEXT_8 MATE_TEXT_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define MATE_TEXT_9 MATE_TEXT_8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define MATE_TEXT_10 MATE_TEXT_9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define MATE_TEXT_11 MATE_TEXT_10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define MATE_TEXT_12 MATE_TEXT_11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define MATE_TEXT_13 MATE_TEXT_12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define MATE_TEXT_14 MATE_TEXT_13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define MATE_TEXT_15 MATE_TEXT_14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define MATE_TEXT_16 MATE_TEXT_15 ", %120, %121, %122, %123, %124, %125, %126, %127"

// One instruction: N = 16 * count, and the numbers of the operands that come after the accumulator's.
#define MATE_WGMMA_SHARED(k, type, n, count, a, b, go, order)                                                    \
  asm volatile("{\n" MATE_DESCRIPTOR("a", a) MATE_DESCRIPTOR(                                                    \
                   "b", b) ".reg .pred go;\nsetp.ne.b32 go, %" go ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n k \
                           ".f32." type "." type " {" MATE_TEXT_##count "}, a, b, go, 1, 1" order ";\n}"         \
               : MATE_OUT_##count                                                                                \
               : "r"(a_matrix), "r"(b_matrix), "r"(accumulate), "n"(b_major == Major::mn))
#define MATE_WGMMA_REGISTERS(k, type, n, count, a0, a1, a2, a3, b, go, order, by_n)                                 \
  if constexpr (may_replace) {                                                                                      \
    asm volatile("{\n" MATE_DESCRIPTOR("b", b) ".reg .pred go;\nsetp.ne.b32 go, %" go                               \
                                               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n k ".f32." type "." type \
                                               " {" MATE_TEXT_##count "}, {%" a0 ", %" a1 ", %" a2 ", %" a3         \
                                                                      "}, b, go, 1, 1" order(by_n) ";\n}"           \
                 : MATE_OUT_##count                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_matrix), "r"(accumulate),                      \
                   "n"(b_major == Major::mn));                                                                      \
  } else {                                                                                                          \
    asm volatile("{\n" MATE_DESCRIPTOR("b", b) "wgmma.mma_async.sync.aligned.m64n" #n k ".f32." type "." type       \
                                               " {" MATE_TEXT_##count "}, {%" a0 ", %" a1 ", %" a2 ", %" a3         \
                                                                      "}, b, 1, 1, 1" order(go) ";\n}"              \
                 : MATE_OUT_##count                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_matrix), "n"(b_major == Major::mn));           \
  }
// Elements of 16 bits may be stored either way.
#define MATE_ORDER(operand) ", %" operand
#define MATE_NO_ORDER(operand)

/// d (64, n) = a (64, K) b (n, K)^T, plus d where `accumulate`: both in shared memory, K-major unless b, of 16 bits, is
/// MN-major. d is the registers of an accumulator from `first` on.
template <ElementType element, int n, Major b_major = Major::k, int first = 0, int size>
__device__ inline void wgmma(float (&d)[size], unsigned a_matrix, unsigned b_matrix, int accumulate) {
  static_assert(n % 16 == 0 && n >= 16 && n <= 256 && first + n / 2 <= size);
#define MATE_CASE(size, count, a, b, go, by_n)                              \
  if constexpr (n == size && element == ElementType::bfloat16) {            \
    MATE_WGMMA_SHARED("k16", "bf16", size, count, a, b, go, ", 0, %" by_n); \
  } else if constexpr (n == size && element == ElementType::float16) {      \
    MATE_WGMMA_SHARED("k16", "f16", size, count, a, b, go, ", 0, %" by_n);  \
  } else if constexpr (n == size) {                                         \
    MATE_WGMMA_SHARED("k32", "e4m3", size, count, a, b, go, "");            \
  }
  MATE_CASE(16, 1, "8", "9", "10", "11")
  MATE_CASE(32, 2, "16", "17", "18", "19")
  MATE_CASE(48, 3, "24", "25", "26", "27")
  MATE_CASE(64, 4, "32", "33", "34", "35")
  MATE_CASE(80, 5, "40", "41", "42", "43")
  MATE_CASE(96, 6, "48", "49", "50", "51")
  MATE_CASE(112, 7, "56", "57", "58", "59")
  MATE_CASE(128, 8, "64", "65", "66", "67")
  MATE_CASE(144, 9, "72", "73", "74", "75")
  MATE_CASE(160, 10, "80", "81", "82", "83")
  MATE_CASE(176, 11, "88", "89", "90", "91")
  MATE_CASE(192, 12, "96", "97", "98", "99")
  MATE_CASE(208, 13, "104", "105", "106", "107")
  MATE_CASE(224, 14, "112", "113", "114", "115")
  MATE_CASE(240, 15, "120", "121", "122", "123")
  MATE_CASE(256, 16, "128", "129", "130", "131")
#undef MATE_CASE
}

/// d (64, n) += a (64, K) b (K, n): a in registers, b in shared memory, MN-major unless it is of e4m3 or the call says
/// otherwise; d likewise. If it `may_replace` d, it does so where `accumulate` is 0.
template <ElementType element, int n, int first = 0, bool may_replace = false,
          Major b_major = element == ElementType::float8_e4m3 ? Major::k : Major::mn, int size>
__device__ inline void wgmma(float (&d)[size], const unsigned* a, unsigned b_matrix,
                             [[maybe_unused]] int accumulate = 1) {
  static_assert(n % 16 == 0 && n >= 16 && n <= 256 && first + n / 2 <= size);
#define MATE_CASE(size, count, a0, a1, a2, a3, b, go, by_n)                                     \
  if constexpr (n == size && element == ElementType::bfloat16) {                                \
    MATE_WGMMA_REGISTERS("k16", "bf16", size, count, a0, a1, a2, a3, b, go, MATE_ORDER, by_n);  \
  } else if constexpr (n == size && element == ElementType::float16) {                          \
    MATE_WGMMA_REGISTERS("k16", "f16", size, count, a0, a1, a2, a3, b, go, MATE_ORDER, by_n);   \
  } else if constexpr (n == size) {                                                             \
    MATE_WGMMA_REGISTERS("k32", "e4m3", size, count, a0, a1, a2, a3, b, go, MATE_NO_ORDER, ""); \
  }
  MATE_CASE(16, 1, "8", "9", "10", "11", "12", "13", "14")
  MATE_CASE(32, 2, "16", "17", "18", "19", "20", "21", "22")
  MATE_CASE(48, 3, "24", "25", "26", "27", "28", "29", "30")
  MATE_CASE(64, 4, "32", "33", "34", "35", "36", "37", "38")
  MATE_CASE(80, 5, "40", "41", "42", "43", "44", "45", "46")
  MATE_CASE(96, 6, "48", "49", "50", "51", "52", "53", "54")
  MATE_CASE(112, 7, "56", "57", "58", "59", "60", "61", "62")
  MATE_CASE(128, 8, "64", "65", "66", "67", "68", "69", "70")
  MATE_CASE(144, 9, "72", "73", "74", "75", "76", "77", "78")
  MATE_CASE(160, 10, "80", "81", "82", "83", "84", "85", "86")
  MATE_CASE(176, 11, "88", "89", "90", "91", "92", "93", "94")
  MATE_CASE(192, 12, "96", "97", "98", "99", "100", "101", "102")
  MATE_CASE(208, 13, "104", "105", "106", "107", "108", "109", "110")
  MATE_CASE(224, 14, "112", "113", "114", "115", "116", "117", "118")
  MATE_CASE(240, 15, "120", "121", "122", "123", "124", "125", "126")
  MATE_CASE(256, 16, "128", "129", "130", "131", "132", "133", "134")
#undef MATE_CASE
}

#undef MATE_DESCRIPTOR
#undef MATE_WGMMA_SHARED
#undef MATE_WGMMA_REGISTERS
#undef MATE_ORDER
#undef MATE_NO_ORDER

}  // namespace mate::cuda::ptx
