// x86 with AVX2 and FMA: 16 registers hold a 4 x 3 tile, its row of vectors and a broadcast.
#define FF_NAMESPACE avx2
#define FF_VECTOR_BYTES 32
#define FF_TILE_ROWS 4
#define FF_TILE_VECTORS 3
#include "table.h"
