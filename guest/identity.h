/* What makes this guest itself after a fork: entropy, time, names, files. */
#ifndef TASKVM_IDENTITY_H
#define TASKVM_IDENTITY_H

#include "transfer.h"

void identity_take(struct transfer *transfer);

#endif
