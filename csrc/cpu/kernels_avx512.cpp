// x86 with AVX-512: 32 registers hold an 8 x 3 tile and its row of vectors; broadcasts come from memory.
#define FF_NAMESPACE avx512
#define FF_VECTOR_BYTES 64
#define FF_TILE_ROWS 8
#define FF_TILE_VECTORS 3
#include "table.h"
