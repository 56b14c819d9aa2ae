// The index maps visit everything exactly once.
#include "pyinf/index_maps.h"

#include <cstdio>
#include <vector>

using namespace pyinf;

static int wrong = 0;
static void expect(bool condition, const char* what) {
  if (!condition) {
    std::printf("WRONG %s\n", what);
    ++wrong;
  }
}

int main() {
  for (std::int64_t rows : {1, 2, 7, 8, 9, 31})
    for (std::int64_t columns : {1, 3, 8, 17})
      for (std::int64_t group : {1, 4, 8, 64}) {
        std::vector<int> seen(rows * columns);
        for (std::int64_t block = 0; block < rows * columns; ++block) {
          const Tile tile = grouped_tile(block, rows, columns, group);
          const bool inside = tile.row >= 0 && tile.row < rows && tile.column >= 0 && tile.column < columns;
          expect(inside, "tile outside the grid");
          if (inside) ++seen[tile.row * columns + tile.column];
        }
        for (int count : seen) expect(count == 1, "a tile is not visited exactly once");
      }
  // Far past 2^31 rows: no 32-bit arithmetic on the way.
  const std::int64_t far = std::int64_t{1} << 40;
  expect(grouped_tile(far * 3 - 1, far, 3, 8).row == far - 1, "the last tile of a very tall grid");

  const std::vector<std::vector<std::int64_t>> cases = {
      {0}, {0, 0}, {0, 1}, {4, 4, 4}, {2, 2, 18, 18, 35, 35}, {0, 16, 32}, {0, 15, 32, 33, 33}, {far, far + 40}};
  for (const auto& offsets : cases) {
    std::int64_t row = offsets.front(), sequence_rows = 0, finished = 0, filled = 0;
    for (std::size_t b = 0; b + 1 < offsets.size(); ++b) filled += offsets[b + 1] > offsets[b];
    for (ChunkCursor<16> c(offsets.data(), static_cast<std::int64_t>(offsets.size()) - 1); c.valid(); c.next()) {
      expect(c.row == row, "rows are skipped or visited twice");
      expect(c.count() >= 1 && c.count() <= 16, "chunk size");
      expect(c.row >= offsets[c.sequence] && c.row + c.count() <= offsets[c.sequence + 1], "chunk crosses sequences");
      row += c.count();
      sequence_rows += c.count();
      if (c.last_of_sequence()) {
        expect(sequence_rows == offsets[c.sequence + 1] - offsets[c.sequence], "rows of a sequence");
        sequence_rows = 0;
        ++finished;
      }
    }
    expect(row == offsets.back() && finished == filled, "not every sequence was finished");
  }
  for (const auto& offsets : cases)
    for (std::int64_t size : {1, 5, 16}) {
      const auto sequences = static_cast<std::int64_t>(offsets.size()) - 1;
      if (sequences == 0) continue;
      std::vector<std::int64_t> next(offsets.begin(), offsets.end() - 1);  // the first row not yet found
      const std::int64_t pieces = (offsets.back() - offsets.front()) / size + sequences;
      for (std::int64_t number = 0; number < pieces; ++number) {
        const Piece piece = find_piece(offsets.data(), sequences, number, size);
        expect(piece.count >= 0 && piece.count <= size, "size of a piece");
        if (piece.count == 0) continue;
        expect(piece.row == next[piece.sequence], "rows of a piece");
        expect(
            number - first_piece(offsets.data(), piece.sequence, size) == (piece.row - offsets[piece.sequence]) / size,
            "number of a piece");
        next[piece.sequence] += piece.count;
      }
      for (std::int64_t b = 0; b < sequences; ++b) expect(next[b] == offsets[b + 1], "a sequence is not whole");
    }
  std::printf(wrong ? "%d wrong\n" : "ok\n", wrong);
  return wrong ? 1 : 0;
}
