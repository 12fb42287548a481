/* All kernels, compiled as one. */

#include "formats.c"
#include "kernels.c"
#include "fused.c"
#include "between.c"
#include "tiles.c"
#include "many.c"
#include "attention.c"
#include "orthogonalize.c"
#include "streams.c"
#include "records.c"
