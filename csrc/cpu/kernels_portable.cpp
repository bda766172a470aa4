// Any processor: 16-byte vectors that the compiler lowers to whatever it has.
#define FF_NAMESPACE portable
#define FF_VECTOR_BYTES 16
#define FF_TILE_ROWS 4
#define FF_TILE_VECTORS 2
#include "table.h"
