/* All kernels, as one unit. */
#include "layer.h"
