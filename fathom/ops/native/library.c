/* All kernels, compiled as one. */

#include "formats.c"
#include "dots.c"
#include "kernels.c"
#include "between.c"
#include "fused.c"
#include "tiles.c"
#include "many.c"
#include "attention.c"
#include "orthogonalize.c"
#include "streams.c"
#include "records.c"
