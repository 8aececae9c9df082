// What searches among points need before they start. Compiled once, for any instruction set: next to the search itself
// it takes no time, and it may use the standard library's containers and algorithms, whose copies made for one
// instruction set would stand in for those of another.
#pragma once

#include <cstdint>

namespace kdejsd {
namespace cpu {

constexpr int64_t kOrderColumns = 8;              // read at a time, so that a point's are from one cache line
constexpr int64_t kOrderSerialSamples = 1 << 12;  // up to which sharing them costs more than it brings

// Orders points [n, d] so that every run [leaf i, leaf (i + 1)) of the order lies close together, and so does every run
// of a tree over these leaves: of leaves [a, b) the first (b - a) / 2 lie on one side of a plane across the widest
// coordinate, the others on the other. Coordinates that are not finite count as 0.
template <class T>
void spatial_order(const T* points, int64_t n, int64_t d, int64_t leaf, int32_t* order, int threads);

// Numbers from 0 on that are equal where the labels [n] are.
void class_ids(const int64_t* labels, int64_t n, int32_t* ids);

}  // namespace cpu
}  // namespace kdejsd
