/* The operation `watch` (docs/protocol-control.md). */
#ifndef TASKVM_WATCH_H
#define TASKVM_WATCH_H

#include "transfer.h"

void watch_run(struct transfer *transfer);

#endif
