/* All kernels, compiled as one translation unit. */
#include "embeddings.h"
#include "layer.h"
#include "maps.h"
#include "pool.h"
