/* The operation `grow` (docs/protocol-control.md). */
#ifndef TASKVM_GROW_H
#define TASKVM_GROW_H

#include "transfer.h"

void grow_root(struct transfer *transfer);

#endif
