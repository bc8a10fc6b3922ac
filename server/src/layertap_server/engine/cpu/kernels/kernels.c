/* All kernels, compiled as one translation unit. */
#include "embeddings.h"
#include "layer.h"
#include "maps.h"
#include "pool.h"

/* The size in bytes of a structure that Python fills, or 0 if there is none of this name. Python compares the
 * sizes with its own when it loads the library. */
#define SIZE_OF(type) \
  if (!strcmp(name, #type)) return sizeof(type)
int64_t layertap_sizeof(const char *name) {
  SIZE_OF(norm);
  SIZE_OF(tensor);
  SIZE_OF(problem);
  SIZE_OF(map);
  SIZE_OF(linear);
  SIZE_OF(operands);
  SIZE_OF(bert_layer);
  SIZE_OF(table);
  SIZE_OF(bert_embeddings);
  return 0;
}
