/* All kernels, compiled as one. */

#include "formats.c"
#include "kernels.c"
#include "fused.c"
#include "streams.c"
#include "between.c"
#include "records.c"
