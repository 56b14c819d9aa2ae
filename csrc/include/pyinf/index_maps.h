// Which tile a block works on and which rows it reads: plain integer functions, the same on host and device, so that a
// test without a GPU can check that every element is visited exactly once.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PYINF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYINF_HOST_DEVICE inline
#endif

namespace pyinf {

PYINF_HOST_DEVICE std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Tile {
  std::int64_t row;
  std::int64_t column;
};

// Block number to tile, walking down `group` rows of tiles before moving one column on: blocks that run at the same
// time then share their operands in the L2 cache. Every tile of the rows × columns grid belongs to exactly one block.
PYINF_HOST_DEVICE Tile grouped_tile(std::int64_t block, std::int64_t rows, std::int64_t columns, std::int64_t group) {
  const std::int64_t per_group = group * columns;
  const std::int64_t first_row = block / per_group * group;
  const std::int64_t left = rows - first_row;
  const std::int64_t height = left < group ? left : group;
  const std::int64_t within = block % per_group;
  return {first_row + within % height, within / height};
}

// Walks the rows of packed sequences in chunks of at most `kChunk` that never cross from one sequence into the next.
// Sequence b is rows offsets[b] .. offsets[b + 1]; empty ones are passed over.
template <int kChunk>
struct ChunkCursor {
  const std::int64_t* offsets;
  std::int64_t sequences;
  std::int64_t sequence;
  std::int64_t row;
  std::int64_t end;

  PYINF_HOST_DEVICE ChunkCursor(const std::int64_t* offsets_, std::int64_t sequences_)
      : offsets(offsets_), sequences(sequences_), sequence(-1), row(0), end(0) {
    settle();
  }

  PYINF_HOST_DEVICE bool valid() const { return sequence < sequences; }
  PYINF_HOST_DEVICE int count() const { return end - row < kChunk ? static_cast<int>(end - row) : kChunk; }
  PYINF_HOST_DEVICE bool last_of_sequence() const { return row + kChunk >= end; }

  PYINF_HOST_DEVICE void next() {
    row += kChunk;
    settle();
  }

 private:
  PYINF_HOST_DEVICE void settle() {
    while (row >= end) {
      if (++sequence >= sequences) return;
      row = offsets[sequence];
      end = offsets[sequence + 1];
    }
  }
};

// Packed sequences cut into pieces of at most `size` rows, every piece with a number of its own that depends on offsets
// alone: sequence b has the numbers first_piece(b) .. first_piece(b) + ceil(length / size), all below rows / size + the
// number of sequences. A few numbers stay unused.
PYINF_HOST_DEVICE std::int64_t first_piece(const std::int64_t* offsets, std::int64_t sequence, std::int64_t size) {
  return (offsets[sequence] - offsets[0]) / size + sequence;
}

struct Piece {
  std::int64_t sequence;
  std::int64_t row;
  std::int64_t count;  // 0: nobody's number
};

PYINF_HOST_DEVICE Piece find_piece(const std::int64_t* offsets, std::int64_t sequences, std::int64_t number,
                                   std::int64_t size) {
  std::int64_t low = 0, high = sequences - 1;  // the last sequence whose first piece is not beyond `number`
  while (low < high) {
    const std::int64_t middle = (low + high + 1) / 2;
    if (first_piece(offsets, middle, size) <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const std::int64_t row = offsets[low] + (number - first_piece(offsets, low, size)) * size;
  const std::int64_t left = offsets[low + 1] - row;
  return {low, row, left < 0 ? 0 : left < size ? left : size};
}

}  // namespace pyinf
