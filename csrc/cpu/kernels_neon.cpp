// 64-bit Arm: 32 registers hold a 4 x 4 tile, its row of vectors and a broadcast.
#define FF_NAMESPACE neon
#define FF_VECTOR_BYTES 16
#define FF_TILE_ROWS 4
#define FF_TILE_VECTORS 4
#include "table.h"
