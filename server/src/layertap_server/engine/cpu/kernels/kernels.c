/* All kernels, as one unit. */
#include "embeddings.h"
#include "layer.h"
#include "maps.h"
#include "pool.h"
