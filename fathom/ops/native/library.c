/* All kernels, compiled as one. */

#include "formats.c"
#include "kernels.c"
#include "fused.c"
#include "records.c"
